// The register tiles of sums of bytes. Compiled once for each instruction set (see simd.h).
//
// Limited by arithmetic, one sum of absolute differences and one addition for eight terms in each
// 64-bit lane; 12 rows × 2 vectors leave half of the loads unused.

#include <cstring>
#include <utility>

#include "integers.h"
#include "simd.h"

namespace jadder::JADDER_ISA {
namespace {

// Each Subtract writes out (-)= sum, for the first `used` columns where a vector has more.

template <class Sums>
JADDER_INLINE void SubtractSome(Sums sum, bool add, int used, int32_t* out) {
  uint64_t sums[sizeof(Sums) / sizeof(uint64_t)];
  std::memcpy(sums, &sum, sizeof(sum));
  for (int c = 0; c < used; ++c) {
    const uint32_t before = add ? static_cast<uint32_t>(out[c]) : 0;
    out[c] = static_cast<int32_t>(before - static_cast<uint32_t>(sums[c]));
  }
}

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

using Sums = __m512i;
inline constexpr int kColumns = 8;

JADDER_INLINE Sums Zero() { return _mm512_setzero_si512(); }
JADDER_INLINE Sums LoadGroup(const uint8_t* p) { return _mm512_loadu_si512(p); }
JADDER_INLINE Sums BroadcastGroup(int64_t v) { return _mm512_set1_epi64(v); }
JADDER_INLINE Sums AddDifferences(Sums sum, Sums a, Sums b) {
  return _mm512_add_epi64(sum, _mm512_sad_epu8(a, b));
}
JADDER_INLINE void Subtract(Sums sum, bool add, int used, int32_t* out) {
  const __m256i low = _mm512_maskz_cvtepi64_epi32(0xff, sum);
  if (used >= kColumns) {  // not by a full mask, which slows stores down
    const auto at = reinterpret_cast<__m256i*>(out);
    const __m256i before = add ? _mm256_loadu_si256(at) : _mm256_setzero_si256();
    return _mm256_storeu_si256(at, _mm256_sub_epi32(before, low));
  }
  const __mmask8 mask = (1 << used) - 1;
  const __m256i before = _mm256_maskz_loadu_epi32(add ? mask : 0, out);
  _mm256_mask_storeu_epi32(out, mask, _mm256_sub_epi32(before, low));
}

#elif defined(__AVX2__) && defined(__FMA__)

using Sums = __m256i;
inline constexpr int kColumns = 4;

JADDER_INLINE Sums Zero() { return _mm256_setzero_si256(); }
JADDER_INLINE Sums LoadGroup(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
JADDER_INLINE Sums BroadcastGroup(int64_t v) { return _mm256_set1_epi64x(v); }
JADDER_INLINE Sums AddDifferences(Sums sum, Sums a, Sums b) {
  return _mm256_add_epi64(sum, _mm256_sad_epu8(a, b));
}
JADDER_INLINE void Subtract(Sums sum, bool add, int used, int32_t* out) {
  if (used < kColumns) return SubtractSome(sum, add, used, out);
  const auto at = reinterpret_cast<__m128i*>(out);
  const __m256i low = _mm256_permutevar8x32_epi32(sum, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  const __m128i before = add ? _mm_loadu_si128(at) : _mm_setzero_si128();
  _mm_storeu_si128(at, _mm_sub_epi32(before, _mm256_castsi256_si128(low)));
}

#elif defined(__SSE2__)

using Sums = __m128i;
inline constexpr int kColumns = 2;

JADDER_INLINE Sums Zero() { return _mm_setzero_si128(); }
JADDER_INLINE Sums LoadGroup(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
JADDER_INLINE Sums BroadcastGroup(int64_t v) { return _mm_set1_epi64x(v); }
JADDER_INLINE Sums AddDifferences(Sums sum, Sums a, Sums b) {
  return _mm_add_epi64(sum, _mm_sad_epu8(a, b));
}
JADDER_INLINE void Subtract(Sums sum, bool add, int used, int32_t* out) {
  if (used < kColumns) return SubtractSome(sum, add, used, out);
  const auto at = reinterpret_cast<__m128i*>(out);
  const __m128i low = _mm_shuffle_epi32(sum, _MM_SHUFFLE(2, 0, 2, 0));
  const __m128i before = add ? _mm_loadl_epi64(at) : _mm_setzero_si128();
  _mm_storel_epi64(at, _mm_sub_epi32(before, low));
}

#else

// Two columns: NEON where the compiler targets it, whatever it makes of vectors elsewhere.
typedef uint64_t Sums __attribute__((vector_size(16)));
typedef uint8_t GroupBytes __attribute__((vector_size(16)));
inline constexpr int kColumns = 2;

JADDER_INLINE Sums Zero() { return Sums{0, 0}; }
JADDER_INLINE Sums LoadGroup(const uint8_t* p) {
  Sums v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
JADDER_INLINE Sums BroadcastGroup(int64_t v) {
  return Sums{static_cast<uint64_t>(v), static_cast<uint64_t>(v)};
}
JADDER_INLINE Sums AddDifferences(Sums sum, Sums a, Sums b) {
#if defined(__ARM_NEON) && defined(__aarch64__)
  const uint8x16_t d = vabdq_u8((uint8x16_t)a, (uint8x16_t)b);
  return (Sums)vpadalq_u32((uint64x2_t)sum, vpaddlq_u16(vpaddlq_u8(d)));
#else
  const GroupBytes x = (GroupBytes)a, y = (GroupBytes)b, above = (GroupBytes)(x > y);
  Sums d = (Sums)(((x - y) & above) | ((y - x) & ~above));
  d = (d & 0x00ff00ff00ff00ff) + ((d >> 8) & 0x00ff00ff00ff00ff);
  d = (d & 0x0000ffff0000ffff) + ((d >> 16) & 0x0000ffff0000ffff);
  return sum + (d & 0xffffffff) + (d >> 32);
#endif
}
JADDER_INLINE void Subtract(Sums sum, bool add, int used, int32_t* out) {
  SubtractSome(sum, add, used < kColumns ? used : kColumns, out);
}

#endif

inline constexpr int kTileRows = kRegisters == 32 ? 12 : 5;
inline constexpr int kTileVectors = 2;

// Vectors of bytes for lane-wise tiles.
inline constexpr int kBytes = 8 * kColumns;
inline constexpr int kLanewiseRows = kRegisters == 32 ? 8 : 4;
typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint16_t Words __attribute__((vector_size(kBytes)));

static_assert(kTileRows <= kMaxIntegerRows && kLanewiseRows <= kMaxIntegerRows);

JADDER_INLINE int64_t LoadEight(const char* p) {
  int64_t v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int kRows, int kVectors>
JADDER_INLINE void AddGroup(const char* const (&row_end)[kRows], int64_t k, int64_t mask,
                            const uint8_t* panel, Sums (&sum)[kRows][kVectors]) {
  Sums w[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) w[v] = LoadGroup(panel + v * kBytes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Sums x = BroadcastGroup(LoadEight(row_end[r] + k) & mask);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = AddDifferences(sum[r][v], x, w[v]);
  }
}

template <int kRows, int kVectors>
__attribute__((noinline)) void SumTile(const IntegerTile& tile) {
  Sums sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Zero();
  }
  const uint8_t* panel = tile.panel;
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    const char* row_end[kRows];  // rows share one counter: there is no register to spare
    const int64_t rest = tile.runs[i].length % 8, whole = tile.runs[i].length - rest;
    const int64_t end = tile.x_offset + tile.runs[i].offset + whole;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      row_end[r] = reinterpret_cast<const char*>(tile.rows[r] + end);
    }
    for (int64_t k = -whole; k < 0; k += 8, panel += kVectors * kBytes) {
      AddGroup(row_end, k, -1, panel, sum);
    }
    if (rest > 0) {
      AddGroup(row_end, 0, (int64_t{1} << (8 * rest)) - 1, panel, sum);
      panel += kVectors * kBytes;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      Subtract(sum[r][v], tile.add, tile.used - v * kColumns,
               tile.out + tile.offsets[r] + v * kColumns);
    }
  }
}

JADDER_INLINE Bytes LoadBytes(const uint8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The sums of bytes 2i are `all` less those of bytes 2i + 1, which count 256 times in it.
JADDER_INLINE void SubtractWords(Words all, Words odd, bool add, int used, int32_t* out) {
  uint16_t evens[kBytes / 2], odds[kBytes / 2];
  const Words even = all - (odd << 8);
  std::memcpy(evens, &even, sizeof(even));
  std::memcpy(odds, &odd, sizeof(odd));
  uint32_t results[kBytes] = {};
  if (add) std::memcpy(results, out, used * sizeof(uint32_t));
  for (int i = 0; i < kBytes / 2; ++i) {
    results[2 * i] -= evens[i];
    results[2 * i + 1] -= odds[i];
  }
  std::memcpy(out, results, used * sizeof(uint32_t));
}

template <int kRows>
__attribute__((noinline)) void LanewiseTile(const IntegerTile& tile) {
  Words all[kRows] = {}, odd[kRows] = {};
  const uint8_t* panel = tile.panel;
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    const int64_t begin = tile.x_offset + tile.runs[i].offset;
    for (int64_t t = 0; t < tile.runs[i].length; ++t, panel += kBytes) {
      const Bytes w = LoadBytes(panel);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Bytes x = LoadBytes(tile.rows[r] + begin + t * kBytes);
        const Words d = (Words)((x > w ? x : w) - (x < w ? x : w));
        all[r] += d;
        odd[r] += d >> 8;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    // The usual size is spelt out for the sake of its copy.
    int32_t* out = tile.out + tile.offsets[r];
    tile.used == kBytes ? SubtractWords(all[r], odd[r], tile.add, kBytes, out)
                        : SubtractWords(all[r], odd[r], tile.add, tile.used, out);
  }
}

using Tile = void (*)(const IntegerTile&);

// Tables by number of rows, from 1.
struct Tiles {
  Tile at[kMaxIntegerRows];
};
template <int kVectors, int... kLess>
constexpr Tiles SumTiles(std::integer_sequence<int, kLess...>) {
  return {{SumTile<kLess + 1, kVectors>...}};
}
template <int... kLess>
constexpr Tiles LanewiseTiles(std::integer_sequence<int, kLess...>) {
  return {{LanewiseTile<kLess + 1>...}};
}

constexpr Tiles kSums1 = SumTiles<1>(std::make_integer_sequence<int, kTileRows>{});
constexpr Tiles kSums2 = SumTiles<2>(std::make_integer_sequence<int, kTileRows>{});
constexpr Tiles kLanewise = LanewiseTiles(std::make_integer_sequence<int, kLanewiseRows>{});

void RunProduct(int rows, int vectors, const IntegerTile& tile) {
  (vectors == 1 ? kSums1 : kSums2).at[rows - 1](tile);
}

void RunLanewiseProduct(int rows, const IntegerTile& tile) { kLanewise.at[rows - 1](tile); }

}  // namespace

const IntegerKernels kIntegerKernels = {kColumns,      kTileRows,  kTileVectors,      kBytes,
                                        kLanewiseRows, RunProduct, RunLanewiseProduct};

}  // namespace jadder::JADDER_ISA
