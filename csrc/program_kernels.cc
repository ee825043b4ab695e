// The tiles of integer programs. Compiled once for each instruction set.
//
// A product of bytes is one multiply-accumulate for each vector where the processor has it for
// bytes (VNNI), of 64 terms, and then so is a sum of distances: |x - w| = 2 max(x, w) - x - w, and
// the maximum runs on units that the multiplication leaves idle. Elsewhere distances go by eights
// into 64-bit lanes, and products by pairs of 16 bits, which is exact.

#include "program_kernels.h"

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define JADDER_AVX512 1
#endif

#if defined(JADDER_AVX512) && defined(__AVX512VNNI__)
#define JADDER_PROGRAM_ISA avx512vnni
#elif defined(JADDER_AVX512)
#define JADDER_PROGRAM_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define JADDER_PROGRAM_ISA avx2
#else
#define JADDER_PROGRAM_ISA baseline
#endif

#define JADDER_NAME_(isa) #isa
#define JADDER_NAME(isa) JADDER_NAME_(isa)
#define JADDER_INLINE inline __attribute__((always_inline))

namespace jadder::JADDER_PROGRAM_ISA {
namespace {

template <typename T>
JADDER_INLINE T LoadAs(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// -- Vectors ---------------------------------------------------------------------------------------

#if defined(JADDER_AVX512)

using Vec = __m512i;
JADDER_INLINE Vec LoadVec(const void* p) { return _mm512_loadu_si512(p); }
JADDER_INLINE void StoreVec(void* p, Vec v) { _mm512_storeu_si512(p, v); }
JADDER_INLINE Vec Broadcast32(int32_t v) { return _mm512_set1_epi32(v); }
JADDER_INLINE Vec Broadcast64(int64_t v) { return _mm512_set1_epi64(v); }
JADDER_INLINE Vec And(Vec a, Vec b) { return _mm512_and_si512(a, b); }
JADDER_INLINE Vec ByteDown16(Vec a) { return _mm512_srli_epi16(a, 8); }
JADDER_INLINE Vec Add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
JADDER_INLINE Vec Sub32(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
JADDER_INLINE Vec Add64(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
JADDER_INLINE Vec PairProducts(Vec a, Vec b) { return _mm512_madd_epi16(a, b); }
JADDER_INLINE Vec Distances(Vec a, Vec b) { return _mm512_sad_epu8(a, b); }
JADDER_INLINE void StoreLow32(int32_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi64_epi32(0xff, v));
}

#elif defined(__AVX2__) && defined(__FMA__)

using Vec = __m256i;
JADDER_INLINE Vec LoadVec(const void* p) { return _mm256_loadu_si256(static_cast<const Vec*>(p)); }
JADDER_INLINE void StoreVec(void* p, Vec v) { _mm256_storeu_si256(static_cast<Vec*>(p), v); }
JADDER_INLINE Vec Broadcast32(int32_t v) { return _mm256_set1_epi32(v); }
JADDER_INLINE Vec Broadcast64(int64_t v) { return _mm256_set1_epi64x(v); }
JADDER_INLINE Vec And(Vec a, Vec b) { return _mm256_and_si256(a, b); }
JADDER_INLINE Vec ByteDown16(Vec a) { return _mm256_srli_epi16(a, 8); }
JADDER_INLINE Vec Add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
JADDER_INLINE Vec Sub32(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
JADDER_INLINE Vec Add64(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
JADDER_INLINE Vec PairProducts(Vec a, Vec b) { return _mm256_madd_epi16(a, b); }
JADDER_INLINE Vec Distances(Vec a, Vec b) { return _mm256_sad_epu8(a, b); }
JADDER_INLINE void StoreLow32(int32_t* p, Vec v) {
  const Vec low = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(low));
}

#elif defined(__SSE2__)

using Vec = __m128i;
JADDER_INLINE Vec LoadVec(const void* p) { return _mm_loadu_si128(static_cast<const Vec*>(p)); }
JADDER_INLINE void StoreVec(void* p, Vec v) { _mm_storeu_si128(static_cast<Vec*>(p), v); }
JADDER_INLINE Vec Broadcast32(int32_t v) { return _mm_set1_epi32(v); }
JADDER_INLINE Vec Broadcast64(int64_t v) { return _mm_set1_epi64x(v); }
JADDER_INLINE Vec And(Vec a, Vec b) { return _mm_and_si128(a, b); }
JADDER_INLINE Vec ByteDown16(Vec a) { return _mm_srli_epi16(a, 8); }
JADDER_INLINE Vec Add32(Vec a, Vec b) { return _mm_add_epi32(a, b); }
JADDER_INLINE Vec Sub32(Vec a, Vec b) { return _mm_sub_epi32(a, b); }
JADDER_INLINE Vec Add64(Vec a, Vec b) { return _mm_add_epi64(a, b); }
JADDER_INLINE Vec PairProducts(Vec a, Vec b) { return _mm_madd_epi16(a, b); }
JADDER_INLINE Vec Distances(Vec a, Vec b) { return _mm_sad_epu8(a, b); }
JADDER_INLINE void StoreLow32(int32_t* p, Vec v) {
  _mm_storel_epi64(reinterpret_cast<Vec*>(p), _mm_shuffle_epi32(v, _MM_SHUFFLE(2, 0, 2, 0)));
}

#endif

// -- Products --------------------------------------------------------------------------------------

// A product gives its sums' type, how it begins and ends them, and how it adds a group.

#if defined(JADDER_AVX512) && defined(__AVX512VNNI__)

template <bool kAdder>
struct Bytes4 {
  static constexpr int kGroup = 4, kColumns = 16, kWeightBytes = 1, kRows = kMostTileRows;
  static constexpr bool kTakesMaximum = kAdder;
  using Sums = Vec;

  static void Pack(const uint8_t* weights, int64_t width, int64_t g, int64_t column,
                   uint8_t* panel) {
    for (int i = 0; i < 4; ++i) panel[(g * width + column) * 4 + i] = weights[i];
  }
  JADDER_INLINE static Sums Begin(const int32_t* start) { return LoadVec(start); }
  JADDER_INLINE static void End(Sums sum, int32_t less, int32_t* out) {
    StoreVec(out, kAdder ? Sub32(sum, Broadcast32(less)) : sum);
  }
  template <int kRows, int kVectors>
  JADDER_INLINE static void AddGroup(const uint8_t* const (&row)[kRows], int64_t k,
                                     const uint8_t* panel, Sums (&sum)[kRows][kVectors]) {
    const Vec two = _mm512_set1_epi8(2);
    Vec w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = LoadVec(panel + v * 64);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Broadcast32(LoadAs<int32_t>(row[r] + k));
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = kAdder ? _mm512_dpbusd_epi32(sum[r][v], _mm512_max_epu8(x, w[v]), two)
                           : _mm512_dpbusd_epi32(sum[r][v], x, w[v]);
      }
    }
  }
};

// The same for a single vector of distances in two halves: then a row's broadcast serves two
// instructions of each kind, as it does where there are two vectors.
struct Halves4 {
  static constexpr int kGroup = 4, kColumns = 16, kWeightBytes = 1;
  struct Sums {
    __m256i half[2];
  };

  JADDER_INLINE static Sums Begin(const int32_t* start) {
    const __m256i* from = reinterpret_cast<const __m256i*>(start);
    return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
  }
  JADDER_INLINE static void End(const Sums& sum, int32_t less, int32_t* out) {
    __m256i* to = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(to, _mm256_sub_epi32(sum.half[0], _mm256_set1_epi32(less)));
    _mm256_storeu_si256(to + 1, _mm256_sub_epi32(sum.half[1], _mm256_set1_epi32(less)));
  }
  template <int kRows, int kVectors>
  JADDER_INLINE static void AddGroup(const uint8_t* const (&row)[kRows], int64_t k,
                                     const uint8_t* panel, Sums (&sum)[kRows][kVectors]) {
    static_assert(kVectors == 1);
    const __m256i two = _mm256_set1_epi8(2);
    const __m256i* from = reinterpret_cast<const __m256i*>(panel);
    const __m256i w[2] = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m256i x = _mm256_set1_epi32(LoadAs<int32_t>(row[r] + k));
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m256i& half = sum[r][0].half[h];
        half = _mm256_dpbusd_epi32(half, _mm256_max_epu8(x, w[h]), two);
      }
    }
  }
};

using Adder = Bytes4<true>;
using SingleAdder = Halves4;
using Multiply = Bytes4<false>;

#elif defined(__SSE2__)

struct Adder {
  static constexpr int kGroup = 8, kColumns = sizeof(Vec) / 8, kWeightBytes = 1;
  static constexpr int kRows = sizeof(Vec) == 64 ? kMostTileRows : 5;
  static constexpr bool kTakesMaximum = false;
  using Sums = Vec;

  static void Pack(const uint8_t* weights, int64_t width, int64_t g, int64_t column,
                   uint8_t* panel) {
    for (int i = 0; i < 8; ++i) panel[(g * width + column) * 8 + i] = weights[i];
  }
  JADDER_INLINE static Sums Begin(const int32_t*) { return Broadcast32(0); }
  JADDER_INLINE static void End(Sums sum, int32_t, int32_t* out) {
    StoreLow32(out, sum);
  }
  template <int kRows, int kVectors>
  JADDER_INLINE static void AddGroup(const uint8_t* const (&row)[kRows], int64_t k,
                                     const uint8_t* panel, Sums (&sum)[kRows][kVectors]) {
    Vec w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = LoadVec(panel + v * sizeof(Vec));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Broadcast64(LoadAs<int64_t>(row[r] + k));
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Add64(sum[r][v], Distances(x, w[v]));
    }
  }
};

using SingleAdder = Adder;

// Terms 0 and 2 of a group, then 1 and 3, as pairs of 16 bits.
struct Multiply {
  static constexpr int kGroup = 4, kColumns = sizeof(Vec) / 4, kWeightBytes = 2;
  static constexpr int kRows = sizeof(Vec) == 64 ? kMostTileRows : 4;
  static constexpr bool kTakesMaximum = false;
  using Sums = Vec;

  static void Pack(const uint8_t* weights, int64_t width, int64_t g, int64_t column,
                   uint8_t* panel) {
    for (int i = 0; i < 4; ++i) {
      const int16_t wide = static_cast<int8_t>(weights[i]);
      const int64_t at = ((g * 2 + i % 2) * width + column) * 2 + i / 2;
      std::memcpy(panel + 2 * at, &wide, 2);
    }
  }
  JADDER_INLINE static Sums Begin(const int32_t*) { return Broadcast32(0); }
  JADDER_INLINE static void End(Sums sum, int32_t, int32_t* out) {
    StoreVec(out, sum);
  }
  template <int kRows, int kVectors>
  JADDER_INLINE static void AddGroup(const uint8_t* const (&row)[kRows], int64_t k,
                                     const uint8_t* panel, Sums (&sum)[kRows][kVectors]) {
    const Vec low = Broadcast32(0x00ff00ff);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      Vec w[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        w[v] = LoadVec(panel + (odd * kVectors + v) * sizeof(Vec));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec four = Broadcast32(LoadAs<int32_t>(row[r] + k));
        const Vec x = odd ? ByteDown16(four) : And(four, low);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Add32(sum[r][v], PairProducts(x, w[v]));
      }
    }
  }
};

#else

// One term at a time, in loops that compilers turn into vectors.
template <bool kAdder>
struct Terms {
  static constexpr int kGroup = 1, kColumns = 16, kWeightBytes = 1, kRows = 4;
  static constexpr bool kTakesMaximum = false;
  struct Sums {
    int32_t at[kColumns];
  };

  static void Pack(const uint8_t* weights, int64_t width, int64_t g, int64_t column,
                   uint8_t* panel) {
    panel[g * width + column] = weights[0];
  }
  JADDER_INLINE static Sums Begin(const int32_t*) { return {}; }
  JADDER_INLINE static void End(const Sums& sum, int32_t, int32_t* out) {
    std::memcpy(out, sum.at, sizeof(sum.at));
  }
  template <int kRows, int kVectors>
  JADDER_INLINE static void AddGroup(const uint8_t* const (&row)[kRows], int64_t k,
                                     const uint8_t* panel, Sums (&sum)[kRows][kVectors]) {
    for (int r = 0; r < kRows; ++r) {
      const int32_t x = row[r][k];
      for (int v = 0; v < kVectors; ++v) {
        for (int c = 0; c < kColumns; ++c) {
          const uint8_t w = panel[v * kColumns + c];
          const int32_t d = x - w;
          sum[r][v].at[c] += kAdder ? (d < 0 ? -d : d) : x * static_cast<int8_t>(w);
        }
      }
    }
  }
};

using Adder = Terms<true>;
using SingleAdder = Adder;
using Multiply = Terms<false>;

#endif

constexpr int kVectors = 2;

template <class Product, int kRows, int kVectors>
__attribute__((noinline)) void Tile(const ProductTile& tile) {
  typename Product::Sums sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Product::Begin(tile.start + v * Product::kColumns);
    }
  }
  constexpr int64_t kPanelGroup =
      kVectors * Product::kColumns * Product::kGroup * Product::kWeightBytes;
  const uint8_t* panel = tile.panel;
  const uint8_t* row[kRows];  // rows share one counter: there is no register to spare
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) row[r] = tile.rows[r];
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    const int64_t end = tile.runs[i].offset + tile.runs[i].length;
    for (int64_t k = tile.runs[i].offset; k < end; k += Product::kGroup, panel += kPanelGroup) {
      Product::AddGroup(row, k, panel, sum);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const int32_t less = tile.less == nullptr ? 0 : tile.less[r];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      Product::End(sum[r][v], less, tile.sums + r * tile.sums_stride + v * Product::kColumns);
    }
  }
}

// Tables by number of rows, from 1.
struct Tiles {
  void (*at[kMostTileRows])(const ProductTile&);
};
template <class Product, int kVectors, int... kLess>
constexpr Tiles MakeTiles(std::integer_sequence<int, kLess...>) {
  return {{Tile<Product, kLess + 1, kVectors>...}};
}

// `Single` is what a row of one vector is computed by.
template <class Product, class Single>
void RunProduct(int rows, int vectors, const ProductTile& tile) {
  constexpr auto kAll = std::make_integer_sequence<int, Product::kRows>{};
  static constexpr Tiles kOne = MakeTiles<Single, 1>(kAll), kTwo = MakeTiles<Product, 2>(kAll);
  (vectors == 1 ? kOne : kTwo).at[rows - 1](tile);
}

template <class Product, class Single = Product>
constexpr ProgramProduct MakeProduct() {
  return {Product::kGroup,
          Product::kColumns,
          kVectors,
          Product::kRows,
          Product::kWeightBytes,
          Product::kTakesMaximum,
          Product::Pack,
          RunProduct<Product, Single>};
}

// -- Requantization --------------------------------------------------------------------------------

#if defined(JADDER_AVX512)

JADDER_INLINE __mmask16 First(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
}

// What is computed before the shift: 32 bits, or 64, of which a shift may leave no more than 32.
enum class Width { kNarrow, kWide, kHigh };

// The constants of a tile and of 16 of its columns, which stores to bytes would otherwise have the
// compiler read again and again.
struct Constants {
  __m128i shift;
  Vec low, high, multiplier, odd_multiplier, narrow_bias, even_bias, odd_bias;

  JADDER_INLINE Constants(const RequantizeTile& tile, Width width, int64_t c)
      : shift(_mm_cvtsi32_si128(tile.shift - (width == Width::kHigh ? 32 : 0))),
        low(width == Width::kWide ? Broadcast64(tile.low) : Broadcast32(tile.low)),
        high(width == Width::kWide ? Broadcast64(tile.high) : Broadcast32(tile.high)),
        multiplier(LoadVec(tile.multiplier + c)) {
    if (width == Width::kNarrow) {
      narrow_bias = LoadVec(tile.narrow_bias + c);
      return;
    }
    odd_multiplier = _mm512_srli_epi64(multiplier, 32);
    const Vec first = LoadVec(tile.bias + c), second = LoadVec(tile.bias + c + 8);
    const Vec even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    even_bias = _mm512_permutex2var_epi64(first, even, second);
    odd_bias = _mm512_permutex2var_epi64(first, Add64(even, _mm512_set1_epi64(1)), second);
  }
};

// The factors of one residual, or none.
struct ResidualConstants {
  __m128i left_shift;
  Vec whole, multiplier;

  JADDER_INLINE explicit ResidualConstants(const TileResidual& each)
      : left_shift(_mm_cvtsi32_si128(each.left_shift)),
        whole(Broadcast32(each.whole)),
        multiplier(Broadcast64(each.multiplier)) {}
};

JADDER_INLINE Vec ResidualBytes(const RequantizeTile& tile, int64_t i, int r, int64_t c,
                                __mmask16 used) {
  const uint8_t* row = tile.residual_rows[i * tile.residual_stride + r] + tile.column + c;
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(used, row));
}

JADDER_INLINE Vec AddNarrow(Vec value, Vec q, const ResidualConstants& residual) {
  return Add32(value, _mm512_mullo_epi32(q, residual.whole));
}

JADDER_INLINE void AddWide(Vec q, const ResidualConstants& residual, Vec& even, Vec& odd) {
  q = _mm512_sll_epi32(q, residual.left_shift);  // of 30 bits at most
  even = Add64(even, _mm512_mul_epi32(q, residual.multiplier));
  odd = Add64(odd, _mm512_mul_epi32(_mm512_srli_epi64(q, 32), residual.multiplier));
}

JADDER_INLINE Vec Bounded(Vec value, const Constants& constants) {
  return _mm512_min_epi32(_mm512_max_epi32(value, constants.low), constants.high);
}

// Shifted values that fit int32, or bounded ones where a shift leaves more.
template <Width kWidth>
JADDER_INLINE Vec ShiftWide(Vec even, Vec odd, const Constants& constants) {
  if (kWidth == Width::kHigh) {
    const Vec high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return _mm512_sra_epi32(high, constants.shift);
  }
  even = _mm512_sra_epi64(even, constants.shift);
  odd = _mm512_sra_epi64(odd, constants.shift);
  even = _mm512_min_epi64(_mm512_max_epi64(even, constants.low), constants.high);
  odd = _mm512_min_epi64(_mm512_max_epi64(odd, constants.low), constants.high);
  return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}

// `kResiduals` of them, or any number where that is 2.
template <Width kWidth, int kResiduals>
JADDER_INLINE Vec Shifted(const RequantizeTile& tile, const Constants& constants,
                          const ResidualConstants& residual, int r, int64_t c, __mmask16 used) {
  const Vec sum = LoadVec(tile.sums + r * tile.sums_stride + c);
  if (kWidth == Width::kNarrow) {
    Vec value = Add32(_mm512_mullo_epi32(sum, constants.multiplier), constants.narrow_bias);
    if (kResiduals == 1) value = AddNarrow(value, ResidualBytes(tile, 0, r, c, used), residual);
    for (int64_t i = 0; kResiduals == 2 && i < tile.num_residuals; ++i) {
      value = AddNarrow(value, ResidualBytes(tile, i, r, c, used),
                        ResidualConstants(tile.residuals[i]));
    }
    return _mm512_sra_epi32(value, constants.shift);
  }
  Vec even = Add64(_mm512_mul_epi32(sum, constants.multiplier), constants.even_bias);
  Vec odd = Add64(_mm512_mul_epi32(_mm512_srli_epi64(sum, 32), constants.odd_multiplier),
                  constants.odd_bias);
  if (kResiduals == 1) AddWide(ResidualBytes(tile, 0, r, c, used), residual, even, odd);
  for (int64_t i = 0; kResiduals == 2 && i < tile.num_residuals; ++i) {
    AddWide(ResidualBytes(tile, i, r, c, used), ResidualConstants(tile.residuals[i]), even, odd);
  }
  return ShiftWide<kWidth>(even, odd, constants);
}

// Four rows of 16 bytes. Packing bounds them to bytes, which leaves the bounds to be done at once.
template <Width kWidth, int kResiduals>
JADDER_INLINE void FourRows(const RequantizeTile& tile, const Constants& constants,
                            const ResidualConstants& residual, int r, int64_t c) {
  Vec q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    q[i] = Shifted<kWidth, kResiduals>(tile, constants, residual, r + i, c, 0xffff);
  }
  Vec bytes = _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  bytes = _mm512_max_epu8(bytes, _mm512_set1_epi8(static_cast<char>(tile.low)));
  bytes = _mm512_min_epu8(bytes, _mm512_set1_epi8(static_cast<char>(tile.high)));
  // Each lane has four columns of every row.
  const Vec order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  bytes = _mm512_permutexvar_epi32(order, bytes);
  const int64_t at = tile.column + c;
  const auto out = [&](int i) { return reinterpret_cast<__m128i*>(tile.out[r + i] + at); };
  _mm_storeu_si128(out(0), _mm512_castsi512_si128(bytes));
  _mm_storeu_si128(out(1), _mm512_extracti32x4_epi32(bytes, 1));
  _mm_storeu_si128(out(2), _mm512_extracti32x4_epi32(bytes, 2));
  _mm_storeu_si128(out(3), _mm512_extracti32x4_epi32(bytes, 3));
}

template <Width kWidth, int kResiduals>
void RequantizeRows(const RequantizeTile& tile) {
  const ResidualConstants residual(kResiduals == 1 ? tile.residuals[0] : TileResidual{});
  for (int64_t c = 0; c < tile.stored; c += 16) {
    const Constants constants(tile, kWidth, c);
    const __mmask16 used = First(tile.used - c), stored = First(tile.stored - c);
    const int64_t at = tile.column + c;
    int r = 0;
    if (tile.wide_out == nullptr && used == 0xffff) {  // not by masks, which slow stores down
      for (; r + 4 <= tile.rows; r += 4) {
        FourRows<kWidth, kResiduals>(tile, constants, residual, r, c);
      }
    }
    for (; r < tile.rows; ++r) {
      Vec q = Shifted<kWidth, kResiduals>(tile, constants, residual, r, c, used);
      if (kWidth != Width::kWide) q = Bounded(q, constants);
      if (tile.wide_out != nullptr) {
        _mm512_mask_storeu_epi32(tile.wide_out[r] + at, used, q);
      } else {
        _mm_mask_storeu_epi8(tile.out[r] + at, stored, _mm512_maskz_cvtepi32_epi8(used, q));
      }
    }
  }
}

template <Width kWidth>
void RequantizeIn(const RequantizeTile& tile) {
  if (tile.num_residuals == 0) return RequantizeRows<kWidth, 0>(tile);
  if (tile.num_residuals == 1) return RequantizeRows<kWidth, 1>(tile);
  RequantizeRows<kWidth, 2>(tile);
}

void Requantize(const RequantizeTile& tile) {
  if (tile.narrow) return RequantizeIn<Width::kNarrow>(tile);
  tile.shift >= 32 ? RequantizeIn<Width::kHigh>(tile) : RequantizeIn<Width::kWide>(tile);
}

#else

JADDER_INLINE int32_t Within(int64_t value, int32_t low, int32_t high) {
  return static_cast<int32_t>(value < low ? low : value > high ? high : value);
}

// A few columns at a time: values in a buffer, of int32 or int64, so that compilers find vectors.
template <typename T, typename Unsigned>
void RequantizeRows(const RequantizeTile& tile) {
  constexpr int64_t kBlock = 64;
  constexpr bool kNarrow = sizeof(T) == 4;
  Unsigned value[kBlock];
  for (int r = 0; r < tile.rows; ++r) {
    for (int64_t begin = 0; begin < tile.used; begin += kBlock) {
      const int64_t count = tile.used - begin < kBlock ? tile.used - begin : kBlock;
      const int64_t first = tile.column + begin;
      const int32_t* sums = tile.sums + r * tile.sums_stride + begin;
      const int32_t* multiplier = tile.multiplier + begin;
      for (int64_t c = 0; c < count; ++c) {
        value[c] = static_cast<Unsigned>(static_cast<T>(sums[c])) *
                   static_cast<Unsigned>(static_cast<T>(multiplier[c]));
      }
      for (int64_t c = 0; c < count; ++c) {
        value[c] += static_cast<Unsigned>(kNarrow ? tile.narrow_bias[begin + c]
                                                  : tile.bias[begin + c]);
      }
      for (int64_t i = 0; i < tile.num_residuals; ++i) {
        const uint8_t* row = tile.residual_rows[i * tile.residual_stride + r] + first;
        const TileResidual& each = tile.residuals[i];
        const Unsigned whole =
            kNarrow ? static_cast<Unsigned>(each.whole)
                    : static_cast<Unsigned>(static_cast<T>(each.multiplier)) << each.left_shift;
        for (int64_t c = 0; c < count; ++c) value[c] += row[c] * whole;
      }
      if (tile.wide_out != nullptr) {
        for (int64_t c = 0; c < count; ++c) {
          tile.wide_out[r][first + c] =
              Within(static_cast<T>(value[c]) >> tile.shift, tile.low, tile.high);
        }
      } else {
        for (int64_t c = 0; c < count; ++c) {
          tile.out[r][first + c] = static_cast<uint8_t>(
              Within(static_cast<T>(value[c]) >> tile.shift, tile.low, tile.high));
        }
      }
    }
    if (tile.wide_out == nullptr) {
      for (int64_t c = tile.used; c < tile.stored; ++c) tile.out[r][tile.column + c] = 0;
    }
  }
}

void Requantize(const RequantizeTile& tile) {
  if (tile.narrow) {
    RequantizeRows<int32_t, uint32_t>(tile);
  } else {
    RequantizeRows<int64_t, uint64_t>(tile);
  }
}

#endif

// -- Sums of x -------------------------------------------------------------------------------------

// Of every eight bytes, a multiple of eight in all.
void SumEights(const uint8_t* row, int64_t bytes, int32_t* sums) {
  int64_t k = 0;
#if defined(JADDER_AVX512)
  for (; k < bytes; k += 64) {
    const __mmask64 mask = bytes - k >= 64 ? ~__mmask64{0} : (__mmask64{1} << (bytes - k)) - 1;
    const Vec x = _mm512_maskz_loadu_epi8(mask, row + k);
    StoreLow32(sums + k / 8, Distances(x, _mm512_setzero_si512()));  // there is room
  }
#endif
  for (; k < bytes; k += 8) {
    int32_t sum = 0;
    for (int64_t j = k; j < k + 8; ++j) sum += row[j];
    sums[k / 8] = sum;
  }
}

// sums[i] = sums[2i] + sums[2i + 1]
void AddPairs(int64_t count, int32_t* sums) {
  int64_t i = 0;
#if defined(JADDER_AVX512)
  const Vec even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Vec odd = Add32(even, Broadcast32(1));
  for (; i + 16 <= count; i += 16) {
    const Vec a = LoadVec(sums + 2 * i), b = LoadVec(sums + 2 * i + 16);
    StoreVec(sums + i,
             Add32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)));
  }
#endif
  for (; i < count; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
}

#if defined(JADDER_AVX512)

// Of 64-bit lanes: the sums of a's and b's pairs, in turns.
JADDER_INLINE Vec AddNeighbours(Vec a, Vec b) {
  return Add64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Of lanes of 128 bits: the sums of a's two pairs, then those of b's.
JADDER_INLINE Vec AddLanes(Vec a, Vec b) {
  return Add64(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
}

// Of eight pixels, each a part of a vector or one, of which `bytes` may be read.
template <int kPitch>
JADDER_INLINE void SumEightPixels(const uint8_t* first, int64_t bytes, int32_t* out) {
  constexpr int kAll = kPitch / 8;
  Vec sums[kAll];
#pragma GCC unroll 8
  for (int i = 0; i < kAll; ++i) {
    const int64_t left = bytes - i * 64;
    const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << (left < 0 ? 0 : left)) - 1;
    sums[i] = Distances(_mm512_maskz_loadu_epi8(mask, first + i * 64), _mm512_setzero_si512());
  }
#pragma GCC unroll 4
  for (int i = 0; i < kAll / 2; ++i) sums[i] = AddNeighbours(sums[2 * i], sums[2 * i + 1]);
#pragma GCC unroll 2
  for (int each = kAll / 2; each > 1; each /= 2) {
    for (int i = 0; i < each / 2; ++i) sums[i] = AddLanes(sums[2 * i], sums[2 * i + 1]);
  }
  Vec order = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  if (kPitch == 16) order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  if (kPitch == 32) order = _mm512_setr_epi64(0, 2, 1, 3, 4, 6, 5, 7);
  StoreLow32(out, _mm512_permutexvar_epi64(order, sums[0]));
}

template <int kPitch>
void SumPixelsOf(const PixelSums& given) {
  for (int64_t x = 0; x < given.pixels; x += 8) {  // there is room
    SumEightPixels<kPitch>(given.first + x * kPitch, (given.pixels - x) * kPitch, given.out + x);
  }
}

#endif

void SumPixels(const PixelSums& given) {
#if defined(JADDER_AVX512)
  if (given.pitch == 16) return SumPixelsOf<16>(given);
  if (given.pitch == 32) return SumPixelsOf<32>(given);
  if (given.pitch == 64) return SumPixelsOf<64>(given);
#endif
  int32_t* sums = given.out;
  if (given.pitch % 8 != 0) {
    for (int64_t x = 0; x < given.pixels; ++x) {
      const uint8_t* pixel = given.first + x * given.pitch;
      int32_t sum = 0;
      for (int64_t c = 0; c < given.pitch; ++c) sum += pixel[c];
      sums[x] = sum;
    }
    return;
  }
  SumEights(given.first, given.pixels * given.pitch, sums);
  int64_t each = given.pitch / 8;
  for (; each % 2 == 0; each /= 2) AddPairs(given.pixels * each / 2, sums);
  if (each == 1) return;
  for (int64_t x = 0; x < given.pixels; ++x) {
    int32_t sum = 0;
    for (int64_t i = 0; i < each; ++i) sum += sums[x * each + i];
    sums[x] = sum;
  }
}

void SumWindows(const WindowSums& given) {
  int64_t i = 0;
#if defined(JADDER_AVX512)
  for (; given.stride == 1 && i < given.count; i += 16) {  // there is room
    Vec sum = _mm512_setzero_si512();
    for (int64_t row = 0; row < given.num_rows; ++row) {
      for (int64_t t = 0; t < given.taps; ++t) {
        sum = Add32(sum, LoadVec(given.rows[row] + i + t * given.dilation));
      }
    }
    _mm512_mask_storeu_epi32(given.out + i, First(given.count - i), sum);
  }
#endif
  for (; i < given.count; ++i) {
    int32_t sum = 0;
    for (int64_t row = 0; row < given.num_rows; ++row) {
      const int32_t* first = given.rows[row] + i * given.stride;
      for (int64_t t = 0; t < given.taps; ++t) sum += first[t * given.dilation];
    }
    given.out[i] = sum;
  }
}

// -- Largest ---------------------------------------------------------------------------------------

void Largest(const uint8_t* const* rows, int64_t num_rows, int64_t bytes, uint8_t* out) {
  int64_t k = 0;
#if defined(__SSE2__)
  for (; k + 16 <= bytes; k += 16) {
    const auto load = [&](int64_t i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + k));
    };
    __m128i largest = load(0);
    for (int64_t i = 1; i < num_rows; ++i) largest = _mm_max_epu8(largest, load(i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), largest);
  }
#endif
  for (; k < bytes; ++k) {
    uint8_t largest = rows[0][k];
    for (int64_t i = 1; i < num_rows; ++i) largest = rows[i][k] > largest ? rows[i][k] : largest;
    out[k] = largest;
  }
}

// -- Pointers --------------------------------------------------------------------------------------

void PointFrom(uint8_t* first, int64_t step, int64_t count, uint8_t** pointers) {
  int64_t i = 0;
#if defined(JADDER_AVX512)
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(first));
  const Vec eight = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  Vec at = Add64(Broadcast64(address), _mm512_mullo_epi64(eight, Broadcast64(step)));
  for (; i + 8 <= count; i += 8, at = Add64(at, Broadcast64(8 * step))) StoreVec(pointers + i, at);
#endif
  for (; i < count; ++i) pointers[i] = first + i * step;
}

constexpr int kPitch = Adder::kGroup > Multiply::kGroup ? Adder::kGroup : Multiply::kGroup;

}  // namespace

const ProgramKernels kProgramKernels = {
    JADDER_NAME(JADDER_PROGRAM_ISA), kPitch,     MakeProduct<Adder, SingleAdder>(),
    MakeProduct<Multiply>(),         Requantize, SumPixels,
    SumWindows,                      Largest,    PointFrom};

}  // namespace jadder::JADDER_PROGRAM_ISA
