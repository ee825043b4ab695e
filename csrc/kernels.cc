// The register tiles. Compiled once for each instruction set (see simd.h).
//
// A tile keeps its sums in registers while the terms stream by: for each term one load for each row
// and one for each vector of the panel, against rows × vectors terms of arithmetic. 12 rows × 1 or
// 2 vectors (5 × 2 with 16 registers) therefore leave the arithmetic as the limit, as in a BLAS.

#include "kernels.h"

#include <utility>

#include "simd.h"

namespace jadder::JADDER_ISA {
namespace {

inline constexpr int kForwardRows = kRegisters == 32 ? 12 : 5;
inline constexpr int kForwardVectors = 2;
// With AVX-512 the subtraction loads a row's value by itself. Zen 4 takes a seventh less time for
// that than where two subtractions share a value that is loaded before.
inline constexpr bool kWideSums = kLanes < 16;
// Of two registers each. There would be room for more, but not for their pointers.
inline constexpr int kPairMaxRows = kRegisters == 32 ? 8 : 6;
inline constexpr int kGradientRows = kRegisters == 32 ? 12 : 6;
#if defined(__AVX512VNNI__)
inline constexpr int kPairClipRows = 9;  // of three registers each
#else
inline constexpr int kPairClipRows = kRegisters == 32 ? 7 : 3;
#endif

static_assert(kForwardRows <= kMaxRows && kGradientRows <= kMaxRows);
static_assert(kForwardVectors * kLanes <= kMaxWidth);

// A one that the compiler cannot see through, or it would undo the choice of units.
JADDER_INLINE Vec OpaqueOne() {
  float one = 1;
  asm volatile("" : "+m"(one));
  return Broadcast(one);
}

// Keeps values that are needed before and after the loop from occupying registers during it.
JADDER_INLINE void ForgetLoads() { asm volatile("" : : : "memory"); }

// Floats from one term of a row to the next, and the term's value in each lane.
template <bool kLanewise>
inline constexpr int kTermFloats = kLanewise ? kLanes : 1;

template <bool kLanewise>
JADDER_INLINE Vec TermValue(const float* term) {
  return kLanewise ? Load(term) : Broadcast(*term);
}

template <class Term, bool kLanewise, int kRows, int kVectors>
JADDER_INLINE void SumTerms(const Tile& tile, Vec (&sum)[kRows][kVectors]) {
  const Vec one = OpaqueOne();
  const float* panel = tile.panel;
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    const char* row_end[kRows];  // rows share one counter of bytes: there is no register to spare
    const int64_t length = tile.runs[i].length * kTermFloats<kLanewise>;
    const int64_t end = tile.runs[i].offset + length;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      row_end[r] = reinterpret_cast<const char*>(tile.rows[r] + end);
    }
    for (int64_t k = -length * int64_t{sizeof(float)}; k < 0;
         k += kTermFloats<kLanewise> * sizeof(float), panel += kVectors * kLanes) {
      Vec lane[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) lane[v] = Load(panel + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec value = TermValue<kLanewise>(reinterpret_cast<const float*>(row_end[r] + k));
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = (r * kVectors + v) % 2
                          ? Term::template Add<true>(sum[r][v], value, lane[v], one)
                          : Term::template Add<false>(sum[r][v], value, lane[v], one);
        }
      }
    }
  }
}

// Writes, or adds, one vector of a row of the result.
JADDER_INLINE void StoreResult(const Tile& tile, int row, int vector, Vec value) {
  float* out = tile.out + tile.offsets[row] + vector * kLanes;
  Store(out, tile.add ? Load(out) + value : value);
}

template <class Term, bool kLanewise, int kRows, int kVectors>
__attribute__((noinline)) void SumTile(const Tile& tile) {
  Vec sum[kRows][kVectors] = {};
  SumTerms<Term, kLanewise>(tile, sum);
  const Vec factor = Broadcast(tile.factor);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      StoreResult(tile, r, v, sum[r][v] * factor);
    }
  }
}

template <int kRows, int kVectors>
JADDER_INLINE bool SumsAreFinite(const Tile& tile) {
  Vec nan[4] = {};
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    nan[v] = Fma(Load(tile.column_sums + v * kLanes), Broadcast(0), nan[v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    nan[r % 4] = Fma(Broadcast(tile.row_sums[r]), Broadcast(0), nan[r % 4]);
  }
  return !AnyNan((nan[0] + nan[1]) + (nan[2] + nan[3]));
}

// Falls back on the absolute value where Σx + Σw is not finite and would make NaN of infinities.
template <int kRows, int kVectors>
void MaxTile(const Tile& tile) {
  if (!SumsAreFinite<kRows, kVectors>(tile)) return SumTile<AbsTerm, false, kRows, kVectors>(tile);
  ForgetLoads();
  Vec sum[kRows][kVectors] = {};
  SumTerms<MaxTerm, false>(tile, sum);
  ForgetLoads();
  const Vec factor = Broadcast(tile.factor);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Vec both = Broadcast(tile.row_sums[r]) + Load(tile.column_sums + v * kLanes);
      StoreResult(tile, r, v, (sum[r][v] + sum[r][v] - both) * factor);
    }
  }
}

// Where the terms of one chunk of a tile are: at row_end[r] + k for k from -bytes on.
template <int kRows>
struct Chunk {
  const char* row_end[kRows];
  int64_t bytes;

  Chunk(const Tile& tile, int64_t begin, int64_t length) : bytes(length * int64_t{sizeof(float)}) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      row_end[r] = reinterpret_cast<const char*>(tile.rows[r] + begin + length);
    }
  }
};

// Calls visit(begin, length) for stretches of nearly equal length of a run, in floats of its rows,
// of which a lane meets every kStride-th.
template <int kStride = 1, class Visit>
JADDER_INLINE void ForEachChunk(const Run& run, Visit visit) {
  const int64_t steps = (run.length + kStride - 1) / kStride;
  const int64_t chunks = (steps + kChunkTerms - 1) / kChunkTerms;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = steps * i / chunks * kStride, end = steps * (i + 1) / chunks * kStride;
    visit(run.offset + begin, (end < run.length ? end : run.length) - begin);
  }
}

JADDER_INLINE Vec BroadcastPair(int16_t value) {
  const Vec integer = ToIntegers(Broadcast(value));
  return PairOf(integer, integer);
}

struct PairMaxTerm {
  JADDER_INLINE static Vec Add(Vec sum, Vec row, Vec lane) {
    return AddPairs(sum, MaxPairs(row, lane));
  }
};
struct PairSquareTerm {
  JADDER_INLINE static Vec Add(Vec sum, Vec row, Vec lane) {
    const Vec difference = SubPairs(row, lane);
    return AddProducts(sum, difference, difference);
  }
};

// Adds the terms of two(r) and two rows of the panel, interleaved: lanes of its first half to
// sum[r][0], of its second to sum[r][1].
template <class Term, int kRows, class Two>
JADDER_INLINE void AddTwoPairs(Vec (&sum)[kRows][2], Vec first, Vec second, Two two) {
  const Vec low = UnpackLow(first, second), high = UnpackHigh(first, second);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec value = two(r);
    sum[r][0] = Term::Add(sum[r][0], value, low);
    sum[r][1] = Term::Add(sum[r][1], value, high);
  }
}

// Two pairs of a row at once, which meet the lanes of two rows of the panel: half the loads, which
// would be the limit. A column's sum is that of two neighbouring lanes then. Calls flush(sum) for
// the sums of each chunk, which begin with `start`.
template <class Term, int kRows, class Flush>
JADDER_INLINE void SumTwoPairs(const Tile& tile, Vec start, Flush flush) {
  const float* panel = tile.panel;
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    ForEachChunk<2>(tile.runs[i], [&](int64_t begin, int64_t length)
                                      __attribute__((always_inline)) {
      const int64_t even = length & ~int64_t{1};
      const Chunk<kRows> chunk(tile, begin, even);
      Vec sum[kRows][2];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = start;
      for (int64_t k = -chunk.bytes; k < 0; k += 2 * sizeof(float), panel += 2 * kLanes) {
        AddTwoPairs<Term>(sum, Load(panel), Load(panel + kLanes),
                          [&](int r) __attribute__((always_inline)) {
          return BroadcastTwo(reinterpret_cast<const float*>(chunk.row_end[r] + k));
        });
      }
      if (even < length) {  // the other pair is zero in both
        AddTwoPairs<Term>(sum, Load(panel), Broadcast(0),
                          [&](int r) __attribute__((always_inline)) {
          const float last[2] = {*reinterpret_cast<const float*>(chunk.row_end[r]), 0};
          return BroadcastTwo(last);
        });
        panel += kLanes;
      }
      flush(sum);
      ForgetLoads();
    });
  }
}

template <int kRows>
void PairMaxTile(const Tile& tile) {
  const Vec ones = BroadcastPair(1);
  Vec total[kRows][2] = {};  // in memory, until the end
  int64_t flushes = 0;
  const Vec start = BroadcastPair(tile.start);
  SumTwoPairs<PairMaxTerm, kRows>(
      tile, start, [&](const Vec (&sum)[kRows][2]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      total[r][0] = AddProducts(total[r][0], sum[r][0], ones);
      total[r][1] = AddProducts(total[r][1], sum[r][1], ones);
    }
    ++flushes;
  });
  const float started = 8.0f * static_cast<float>(flushes) * tile.start;
  const Vec twice = Broadcast(2 * tile.step * tile.factor);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const float both = tile.row_sums[r] + started;  // of the row, and what sums began with
    const Vec rest = Load(tile.column_sums) - Broadcast(both * tile.step);
    const Vec sum = ToFloats(AddNeighbours(total[r][0], total[r][1]));
    StoreResult(tile, r, 0, Fma(sum, twice, rest * Broadcast(tile.factor)));
  }
}

template <int kRows>
void PairSquareTile(const Tile& tile) {
  Vec total[kRows] = {};
  SumTwoPairs<PairSquareTerm, kRows>(
      tile, Broadcast(0), [&](const Vec (&sum)[kRows][2]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      total[r] = total[r] + ToFloats(AddNeighbours(sum[r][0], sum[r][1]));
    }
  });
  const Vec factor = Broadcast(tile.factor * tile.step * tile.step);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) StoreResult(tile, r, 0, total[r] * factor);
}

// Adds Σ of_lane(r, panel) · g to total[r], where rows are g. Chunks' sums fit 32 bits.
template <int kRows, class OfLane>
JADDER_INLINE void SumPairProducts(const Tile& tile, Vec (&total)[kRows], OfLane of_lane) {
  const float* panel = tile.panel;
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    ForEachChunk(tile.runs[i], [&](int64_t begin, int64_t length) __attribute__((always_inline)) {
      const Chunk<kRows> chunk(tile, begin, length);
      Vec sum[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r] = Broadcast(0);
      for (int64_t k = -chunk.bytes; k < 0; k += sizeof(float), panel += kLanes) {
        const Vec lane = Load(panel);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const float* g = reinterpret_cast<const float*>(chunk.row_end[r] + k);
          sum[r] = AddBroadcastProducts(sum[r], of_lane(r, lane), g);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) total[r] = total[r] + ToFloats(sum[r]);
      ForgetLoads();
    });
  }
}

// Σ clip(w - x, ±bound) g = Σ clip(w, x ± bound) g - x Σ g: two operations less for each term.
template <int kRows>
void PairClipTile(const Tile& tile) {
  const Vec bound = BroadcastPair(tile.bound_steps), inverse = Broadcast(1 / tile.step);
  Vec low[kRows], high[kRows], total[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec x = ToIntegers(Load(tile.targets + tile.target_offsets[r]) * inverse);
    const Vec both = PairOf(x, x);
    low[r] = SubPairs(both, bound);
    high[r] = AddPairs(both, bound);
    total[r] = ToFloats(x) * Broadcast(-tile.row_sums[r]);
  }
  SumPairProducts(tile, total, [&](int r, Vec lane) __attribute__((always_inline)) {
    return MinPairs(MaxPairs(lane, low[r]), high[r]);
  });
  const Vec factor = Broadcast(tile.factor * tile.step * tile.row_step);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) StoreResult(tile, r, 0, total[r] * factor);
}

// Σ (w - x) g = Σ w g - x Σ g, where x need not be on a grid.
template <int kRows>
void PairLinearTile(const Tile& tile) {
  Vec total[kRows] = {};
  SumPairProducts(tile, total, [](int, Vec lane) __attribute__((always_inline)) { return lane; });
  const Vec step = Broadcast(tile.step), factor = Broadcast(tile.factor * tile.row_step);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec x = Load(tile.targets + tile.target_offsets[r]);
    StoreResult(tile, r, 0, Fma(total[r], step, x * Broadcast(-tile.row_sums[r])) * factor);
  }
}

template <class Term, bool kLanewise, int kRows>
JADDER_INLINE void GradientTile(const Tile& tile) {
  const Vec one = OpaqueOne(), bound = Broadcast(tile.bound);
  Vec sum[kRows], target[kRows];
  const float* panel = tile.panel;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r] = Broadcast(0);
    target[r] = Load(tile.targets + tile.target_offsets[r]);
  }
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    const char* row_end[kRows];  // rows share one counter of bytes: there is no register to spare
    const int64_t length = tile.runs[i].length * kTermFloats<kLanewise>;
    const int64_t end = tile.runs[i].offset + length;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      row_end[r] = reinterpret_cast<const char*>(tile.rows[r] + end);
    }
    for (int64_t k = -length * int64_t{sizeof(float)}; k < 0;
         k += kTermFloats<kLanewise> * sizeof(float), panel += kLanes) {
      const Vec lane = Load(panel);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec value = TermValue<kLanewise>(reinterpret_cast<const float*>(row_end[r] + k));
        sum[r] = r % 2 ? Term::template Add<true>(sum[r], target[r], lane, value, one, bound)
                       : Term::template Add<false>(sum[r], target[r], lane, value, one, bound);
      }
    }
  }
  const Vec factor = Broadcast(tile.factor);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) StoreResult(tile, r, 0, sum[r] * factor);
}

template <bool kLanewise, int kRows>
void LinearTile(const Tile& tile) {
  GradientTile<LinearTerm, kLanewise, kRows>(tile);
}

template <class Term, class ExactTerm, bool kLanewise, int kRows>
void CheckedGradientTile(const Tile& tile) {
  Vec nan[3] = {};
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    nan[r % 3] = Fma(Load(tile.targets + tile.target_offsets[r]), Broadcast(0), nan[r % 3]);
  }
  if (tile.panel_is_finite && !AnyNan(nan[0] + nan[1] + nan[2])) {
    return GradientTile<Term, kLanewise, kRows>(tile);
  }

  Tile part = tile;
  for (int r = 0; r < kRows; ++r) {
    part.rows = tile.rows + r;
    part.offsets = tile.offsets + r;
    part.target_offsets = tile.target_offsets + r;
    GradientTile<ExactTerm, kLanewise, 1>(part);
  }
}

template <int kRows, int kVectors>
JADDER_INLINE void StoreOuter(const OuterTile& tile, const Vec (&sum)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* out = tile.out + r * tile.out_stride + v * kLanes;
      Store(out, tile.add ? Load(out) + sum[r][v] : sum[r][v]);
    }
  }
}

template <bool kLanewise, int kRows, int kVectors>
void ProductOuterTile(const OuterTile& tile) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < tile.positions; ++p) {
    const float* x = tile.x[p] + tile.x_offset;
    const float* g = tile.g + tile.g_offsets[p];
    Vec lane[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) lane[v] = Load(g + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = TermValue<kLanewise>(x + r * kTermFloats<kLanewise>);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Fma(value, lane[v], sum[r][v]);
    }
  }
  StoreOuter(tile, sum);
}

template <int kRows, int kVectors>
void PairOuterTile(const OuterTile& tile) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < tile.positions; ++p) {
    const float* x = tile.x[p] + tile.x_offset;
    const float* g = tile.g + tile.g_offsets[p];
    Vec lane[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) lane[v] = Load(g + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (kVectors == 1) {
        sum[r][0] = AddBroadcastProducts(sum[r][0], lane[0], x + r);
        continue;
      }
      const Vec value = Broadcast(x[r]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = AddProducts(sum[r][v], value, lane[v]);
    }
  }
  const Vec step = Broadcast(tile.step);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = ToFloats(sum[r][v]) * step;
  }
  StoreOuter(tile, sum);
}

template <class Term, bool kLanewise, int kRows>
JADDER_INLINE void BoundedOuterTile(const OuterTile& tile) {
  const Vec one = OpaqueOne(), bound = Broadcast(tile.bound);
  Vec sum[kRows][1] = {}, target[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) target[r] = Load(tile.targets + r * tile.out_stride);
  for (int64_t p = 0; p < tile.positions; ++p) {
    const float* x = tile.x[p] + tile.x_offset;
    const Vec lane = Load(tile.g + tile.g_offsets[p]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = TermValue<kLanewise>(x + r * kTermFloats<kLanewise>);
      sum[r][0] = r % 2 ? Term::template Add<true>(sum[r][0], value, target[r], lane, one, bound)
                        : Term::template Add<false>(sum[r][0], value, target[r], lane, one, bound);
    }
  }
  StoreOuter(tile, sum);
}

template <class Term, class ExactTerm, bool kLanewise, int kRows>
void CheckedOuterTile(const OuterTile& tile) {
  Vec nan = Broadcast(0);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    nan = Fma(Load(tile.targets + r * tile.out_stride), Broadcast(0), nan);
  }
  if (tile.x_is_finite && !AnyNan(nan)) return BoundedOuterTile<Term, kLanewise, kRows>(tile);

  OuterTile part = tile;
  for (int r = 0; r < kRows; ++r) {
    part.x_offset = tile.x_offset + r * kTermFloats<kLanewise>;
    part.out = tile.out + r * tile.out_stride;
    part.targets = tile.targets + r * tile.out_stride;
    BoundedOuterTile<ExactTerm, kLanewise, 1>(part);
  }
}

// How many vectors of pixels share the value that w has for them, in registers.
constexpr int PixelVectors(int channels) {
  return channels == 1 ? 4 : channels <= (kRegisters == 32 ? 5 : 3) ? 2 : 1;
}
constexpr int PairPixelVectors(int channels) {
  return channels == 1 ? 4 : channels <= (kRegisters == 32 ? 4 : 1) ? 2 : 1;
}

template <class Term, int kChannels, int kVectors>
JADDER_INLINE void SumPixels(const PixelBlock& block, int64_t first) {
  const Vec one = OpaqueOne(), bound = Broadcast(block.bound);
  Vec sum[kChannels][kVectors], x[kChannels][kVectors];
#pragma GCC unroll 16
  for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sum[c][v] = Broadcast(0);
      x[c][v] = Load(block.x + c * block.channel_stride + (first + v) * kLanes);
    }
  }
  for (int64_t i = 0; i < block.num_taps; ++i) {
    const float* w = block.w + block.taps[i].w_offset;
    const float* const end = w + block.terms * kChannels;
    const float* g[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      g[v] = block.g + block.starts[first + v] + block.taps[i].g_offset;
    }
    for (; w < end; w += kChannels) {
      Vec value[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        value[v] = Load(g[v]);
        g[v] += block.g_stride;
      }
#pragma GCC unroll 16
      for (int c = 0; c < kChannels; ++c) {
        const Vec lane = Broadcast(w[c]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          sum[c][v] =
              (c * kVectors + v) % 2
                  ? Term::template Add<true>(sum[c][v], x[c][v], lane, value[v], one, bound)
                  : Term::template Add<false>(sum[c][v], x[c][v], lane, value[v], one, bound);
        }
      }
    }
  }
  const Vec factor = Broadcast(block.factor);
#pragma GCC unroll 16
  for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      Store(block.out + c * block.channel_stride + (first + v) * kLanes, sum[c][v] * factor);
    }
  }
}

template <int kChannels, int kVectors>
JADDER_INLINE bool PixelsAreFinite(const PixelBlock& block, int64_t first) {
  Vec nan = Broadcast(0);
#pragma GCC unroll 16
  for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      nan = Fma(Load(block.x + c * block.channel_stride + (first + v) * kLanes), Broadcast(0), nan);
    }
  }
  return !AnyNan(nan);
}

template <class Term, class ExactTerm>
struct PixelSums {
  static constexpr int Vectors(int channels) { return PixelVectors(channels); }

  template <int kChannels, int kVectors>
  __attribute__((noinline)) static void Run(const PixelBlock& block, int64_t first) {
    if (PixelsAreFinite<kChannels, kVectors>(block, first)) {
      return SumPixels<Term, kChannels, kVectors>(block, first);
    }
    for (int v = 0; v < kVectors; ++v) SumPixels<ExactTerm, kChannels, 1>(block, first + v);
  }
};

struct LinearPixelSums {
  static constexpr int Vectors(int channels) { return PixelVectors(channels); }

  template <int kChannels, int kVectors>
  __attribute__((noinline)) static void Run(const PixelBlock& block, int64_t first) {
    SumPixels<LinearTerm, kChannels, kVectors>(block, first);
  }
};

// As PairClipTile. Chunks go on from tap to tap, which may have few terms.
struct PairPixelSums {
  static constexpr int Vectors(int channels) { return PairPixelVectors(channels); }

  template <int kChannels, int kVectors>
  __attribute__((noinline)) static void Run(const PixelBlock& block, int64_t first) {
    const Vec bound = BroadcastPair(block.bound_steps), inverse = Broadcast(1 / block.step);
    Vec low[kChannels][kVectors], high[kChannels][kVectors], sum[kChannels][kVectors];
    Vec total[kChannels][kVectors], of_g[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      of_g[v] = Broadcast(0);
      const float* sums = block.g + block.starts[first + v] + block.terms * block.g_stride;
      for (int64_t i = 0; i < block.num_taps; ++i) {
        of_g[v] = of_g[v] + Load(sums + block.taps[i].g_offset);
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const float* target = block.x + c * block.channel_stride + (first + v) * kLanes;
        const Vec x = ToIntegers(Load(target) * inverse), both = PairOf(x, x);
        low[c][v] = SubPairs(both, bound);
        high[c][v] = AddPairs(both, bound);
        total[c][v] = Sub(Broadcast(0), ToFloats(x) * of_g[v]);
        sum[c][v] = Broadcast(0);
      }
    }
    int64_t room = kChunkTerms;
    for (int64_t i = 0; i < block.num_taps; ++i) {
      const float* w = block.w + block.taps[i].w_offset;
      const float* g[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        g[v] = block.g + block.starts[first + v] + block.taps[i].g_offset;
      }
      for (int64_t left = block.terms; left > 0;) {
        const int64_t length = left < room ? left : room;
        const float* const end = w + length * kChannels;
        for (; w < end; w += kChannels) {
          Vec value[kVectors];
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) {
            value[v] = Load(g[v]);
            g[v] += block.g_stride;
          }
#pragma GCC unroll 16
          for (int c = 0; c < kChannels; ++c) {
            const Vec lane = Broadcast(w[c]);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) {
              const Vec clipped = MinPairs(MaxPairs(lane, low[c][v]), high[c][v]);
              sum[c][v] = AddProducts(sum[c][v], clipped, value[v]);
            }
          }
        }
        left -= length;
        room -= length;
        if (room > 0) continue;
        room = kChunkTerms;
#pragma GCC unroll 16
        for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) {
            total[c][v] = total[c][v] + ToFloats(sum[c][v]);
            sum[c][v] = Broadcast(0);
          }
        }
        ForgetLoads();
      }
    }
    const Vec factor = Broadcast(block.factor * block.step * block.row_step);
#pragma GCC unroll 16
    for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        Store(block.out + c * block.channel_stride + (first + v) * kLanes,
              (total[c][v] + ToFloats(sum[c][v])) * factor);
      }
    }
  }
};

template <class Sums, int kChannels>
void RunPixelBlock(const PixelBlock& block) {
  constexpr int kVectors = Sums::Vectors(kChannels);
  int64_t v = 0;
  for (; v + kVectors <= block.vectors; v += kVectors) {
    Sums::template Run<kChannels, kVectors>(block, v);
  }
  for (; v < block.vectors; ++v) Sums::template Run<kChannels, 1>(block, v);
}

template <class Function, int kSize>
struct Table {
  Function at[kSize];
};
using Tiles = Table<void (*)(const Tile&), kMaxRows>;
using OuterTiles = Table<void (*)(const OuterTile&), kMaxRows>;
using PixelBlocks = Table<void (*)(const PixelBlock&), kMaxPixelChannels>;

// Tables by number of rows, from 1.
template <class Term, bool kLanewise, int kVectors, int... kLess>
constexpr Tiles SumTiles(std::integer_sequence<int, kLess...>) {
  return {{SumTile<Term, kLanewise, kLess + 1, kVectors>...}};
}
template <int kVectors, int... kLess>
constexpr Tiles MaxTiles(std::integer_sequence<int, kLess...>) {
  return {{MaxTile<kLess + 1, kVectors>...}};
}
template <int... kLess>
constexpr Tiles PairMaxTiles(std::integer_sequence<int, kLess...>) {
  return {{PairMaxTile<kLess + 1>...}};
}
template <int... kLess>
constexpr Tiles PairSquareTiles(std::integer_sequence<int, kLess...>) {
  return {{PairSquareTile<kLess + 1>...}};
}
template <int... kLess>
constexpr Tiles PairClipTiles(std::integer_sequence<int, kLess...>) {
  return {{PairClipTile<kLess + 1>...}};
}
template <int... kLess>
constexpr Tiles PairLinearTiles(std::integer_sequence<int, kLess...>) {
  return {{PairLinearTile<kLess + 1>...}};
}
template <class Term, class ExactTerm, bool kLanewise, int... kLess>
constexpr Tiles GradientTiles(std::integer_sequence<int, kLess...>) {
  return {{CheckedGradientTile<Term, ExactTerm, kLanewise, kLess + 1>...}};
}
template <bool kLanewise, int... kLess>
constexpr Tiles LinearTiles(std::integer_sequence<int, kLess...>) {
  return {{LinearTile<kLanewise, kLess + 1>...}};
}
template <bool kLanewise, int kVectors, int... kLess>
constexpr OuterTiles ProductOuterTiles(std::integer_sequence<int, kLess...>) {
  return {{ProductOuterTile<kLanewise, kLess + 1, kVectors>...}};
}
template <int kVectors, int... kLess>
constexpr OuterTiles PairOuterTiles(std::integer_sequence<int, kLess...>) {
  return {{PairOuterTile<kLess + 1, kVectors>...}};
}
template <class Term, class ExactTerm, bool kLanewise, int... kLess>
constexpr OuterTiles BoundedOuterTiles(std::integer_sequence<int, kLess...>) {
  return {{CheckedOuterTile<Term, ExactTerm, kLanewise, kLess + 1>...}};
}
template <class Sums, int... kLess>
constexpr PixelBlocks PixelBlocksOf(std::integer_sequence<int, kLess...>) {
  return {{RunPixelBlock<Sums, kLess + 1>...}};
}

using ForwardSizes = std::make_integer_sequence<int, kForwardRows>;
using GradientSizes = std::make_integer_sequence<int, kGradientRows>;
using ChannelSizes = std::make_integer_sequence<int, kMaxPixelChannels>;

constexpr Tiles kAbs1 = SumTiles<AbsTerm, false, 1>(ForwardSizes{});
constexpr Tiles kAbs2 = SumTiles<AbsTerm, false, 2>(ForwardSizes{});
constexpr Tiles kSquare1 = SumTiles<SquareTerm, false, 1>(ForwardSizes{});
constexpr Tiles kSquare2 = SumTiles<SquareTerm, false, 2>(ForwardSizes{});
constexpr Tiles kMax1 = MaxTiles<1>(ForwardSizes{});
constexpr Tiles kMax2 = MaxTiles<2>(ForwardSizes{});
constexpr Tiles kPairMaxs = PairMaxTiles(std::make_integer_sequence<int, kPairMaxRows>{});
constexpr Tiles kPairSquares =
    PairSquareTiles(std::make_integer_sequence<int, kPairMaxRows>{});
constexpr Tiles kPairLinears = PairLinearTiles(GradientSizes{});
constexpr Tiles kPairClips = PairClipTiles(std::make_integer_sequence<int, kPairClipRows>{});
constexpr Tiles kClips = GradientTiles<ClipTerm, ExactClipTerm, false>(GradientSizes{});
constexpr Tiles kSigns = GradientTiles<SignTerm, ExactSignTerm, false>(GradientSizes{});
constexpr Tiles kLinears = LinearTiles<false>(GradientSizes{});
constexpr OuterTiles kOuter1 = ProductOuterTiles<false, 1>(ForwardSizes{});
constexpr OuterTiles kOuter2 = ProductOuterTiles<false, 2>(ForwardSizes{});
constexpr OuterTiles kPairOuter1 = PairOuterTiles<1>(ForwardSizes{});
constexpr OuterTiles kPairOuter2 = PairOuterTiles<2>(ForwardSizes{});
constexpr OuterTiles kOuterClips =
    BoundedOuterTiles<ClipTerm, ExactClipTerm, false>(GradientSizes{});
constexpr OuterTiles kOuterSigns =
    BoundedOuterTiles<SignTerm, ExactSignTerm, false>(GradientSizes{});

constexpr Tiles kLaneAbs = SumTiles<AbsTerm, true, 1>(ForwardSizes{});
constexpr Tiles kLaneSquares = SumTiles<SquareTerm, true, 1>(ForwardSizes{});
constexpr Tiles kLaneClips = GradientTiles<ClipTerm, ExactClipTerm, true>(GradientSizes{});
constexpr Tiles kLaneSigns = GradientTiles<SignTerm, ExactSignTerm, true>(GradientSizes{});
constexpr Tiles kLaneLinears = LinearTiles<true>(GradientSizes{});
constexpr OuterTiles kLaneOuter = ProductOuterTiles<true, 1>(ForwardSizes{});
constexpr OuterTiles kLaneOuterClips =
    BoundedOuterTiles<ClipTerm, ExactClipTerm, true>(GradientSizes{});
constexpr OuterTiles kLaneOuterSigns =
    BoundedOuterTiles<SignTerm, ExactSignTerm, true>(GradientSizes{});

constexpr PixelBlocks kPixelClips =
    PixelBlocksOf<PixelSums<ClipTerm, ExactClipTerm>>(ChannelSizes{});
constexpr PixelBlocks kPixelSigns =
    PixelBlocksOf<PixelSums<SignTerm, ExactSignTerm>>(ChannelSizes{});
constexpr PixelBlocks kPixelLinears = PixelBlocksOf<LinearPixelSums>(ChannelSizes{});
constexpr PixelBlocks kPixelPairClips = PixelBlocksOf<PairPixelSums>(ChannelSizes{});

void RunProduct(Product product, int rows, int vectors, const Tile& tile) {
  switch (product) {
    case Product::kAbs:
      return (vectors == 1 ? kAbs1 : kAbs2).at[rows - 1](tile);
    case Product::kMax:
      return (vectors == 1 ? kMax1 : kMax2).at[rows - 1](tile);
    case Product::kSquare:
      return (vectors == 1 ? kSquare1 : kSquare2).at[rows - 1](tile);
    case Product::kClip:
      return kClips.at[rows - 1](tile);
    case Product::kSign:
      return kSigns.at[rows - 1](tile);
    case Product::kLinear:
      return kLinears.at[rows - 1](tile);
    case Product::kPairMax:
      return kPairMaxs.at[rows - 1](tile);
    case Product::kPairSquare:
      return kPairSquares.at[rows - 1](tile);
    case Product::kPairLinear:
      return kPairLinears.at[rows - 1](tile);
    case Product::kPairClip:
      return kPairClips.at[rows - 1](tile);
    case Product::kOuter:
    case Product::kPairOuter:
      break;
  }
}

void RunLanewiseProduct(Product product, int rows, const Tile& tile) {
  switch (product) {
    case Product::kAbs:
      return kLaneAbs.at[rows - 1](tile);
    case Product::kSquare:
      return kLaneSquares.at[rows - 1](tile);
    case Product::kClip:
      return kLaneClips.at[rows - 1](tile);
    case Product::kSign:
      return kLaneSigns.at[rows - 1](tile);
    case Product::kLinear:
      return kLaneLinears.at[rows - 1](tile);
    default:
      break;
  }
}

// Several rows at once: each sum is a chain of additions that wait for one another.
template <int kRows>
JADDER_INLINE void SumRows(const float* const* rows, const Run* runs, int64_t num_runs,
                           float* sums) {
  Vec sum[kRows] = {};
  for (int64_t i = 0; i < num_runs; ++i) {
    const int64_t end = runs[i].offset + runs[i].length;
    int64_t k = runs[i].offset;
    for (; k + kLanes <= end; k += kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r] = sum[r] + Load(rows[r] + k);
    }
    if (k == end) continue;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r] = sum[r] + LoadFirst(rows[r] + k, end - k);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r] = HorizontalSum(sum[r]);
}

void RowSums(const Tile& tile, int rows, float* sums) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) SumRows<4>(tile.rows + r, tile.runs, tile.num_runs, sums + r);
  for (; r < rows; ++r) SumRows<1>(tile.rows + r, tile.runs, tile.num_runs, sums + r);
}

template <int kRows>
JADDER_INLINE void SumPairs(const Tile& tile, const float* const* rows, float* sums) {
  const Vec ones = BroadcastPair(1);
  Vec sum[kRows] = {};
  for (int64_t i = 0; i < tile.num_runs; ++i) {
    const int64_t end = tile.runs[i].offset + tile.runs[i].length;
    int64_t k = tile.runs[i].offset;
    for (; k + kLanes <= end; k += kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sum[r] = AddProducts(sum[r], Load(rows[r] + k), ones);
      }
    }
    if (k == end) continue;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sum[r] = AddProducts(sum[r], LoadFirst(rows[r] + k, end - k), ones);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r] = HorizontalSum(ToFloats(sum[r]));
}

void PairSums(const Tile& tile, int rows, float* sums) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) SumPairs<4>(tile, tile.rows + r, sums + r);
  for (; r < rows; ++r) SumPairs<1>(tile, tile.rows + r, sums + r);
}

void RunOuter(Product product, int rows, int vectors, const OuterTile& tile) {
  switch (product) {
    case Product::kOuter:
      return (vectors == 1 ? kOuter1 : kOuter2).at[rows - 1](tile);
    case Product::kPairOuter:
      return (vectors == 1 ? kPairOuter1 : kPairOuter2).at[rows - 1](tile);
    case Product::kClip:
      return kOuterClips.at[rows - 1](tile);
    case Product::kSign:
      return kOuterSigns.at[rows - 1](tile);
    default:
      break;
  }
}

void RunLanewiseOuter(Product product, int rows, const OuterTile& tile) {
  switch (product) {
    case Product::kOuter:
      return kLaneOuter.at[rows - 1](tile);
    case Product::kClip:
      return kLaneOuterClips.at[rows - 1](tile);
    case Product::kSign:
      return kLaneOuterSigns.at[rows - 1](tile);
    default:
      break;
  }
}

void RunPixels(Product product, int channels, const PixelBlock& block) {
  switch (product) {
    case Product::kClip:
      return kPixelClips.at[channels - 1](block);
    case Product::kSign:
      return kPixelSigns.at[channels - 1](block);
    case Product::kLinear:
      return kPixelLinears.at[channels - 1](block);
    case Product::kPairClip:
      return kPixelPairClips.at[channels - 1](block);
    default:
      break;
  }
}

typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

JADDER_INLINE Four LowHalves(Four a, Four b) {  // a0 b0 a1 b1
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#else
  typedef int32_t Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{0, 4, 1, 5});
#endif
}
JADDER_INLINE Four HighHalves(Four a, Four b) {  // a2 b2 a3 b3
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  typedef int32_t Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{2, 6, 3, 7});
#endif
}

void Transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
               int64_t to_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* row = from + r * from_stride;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      Four in[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        in[i] = *reinterpret_cast<const UnalignedFour*>(row + i * from_stride + c);
      }
      const Four even[2] = {LowHalves(in[0], in[2]), HighHalves(in[0], in[2])};
      const Four odd[2] = {LowHalves(in[1], in[3]), HighHalves(in[1], in[3])};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<UnalignedFour*>(to + (c + i) * to_stride + r) =
            i % 2 ? HighHalves(even[i / 2], odd[i / 2]) : LowHalves(even[i / 2], odd[i / 2]);
      }
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < 4; ++i) to[c * to_stride + r + i] = row[i * from_stride + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

void PlaneSums(const float* planes, int64_t stride, int64_t count, int64_t width, float* sums) {
  const Vec ones = BroadcastPair(1);
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec sum = Broadcast(0);
    for (int64_t p = 0; p < count; ++p) {
      sum = AddProducts(sum, Load(planes + p * stride + i), ones);
    }
    Store(sums + i, ToFloats(sum));
  }
}

void AddRows(const float* data, const int64_t* offsets, int64_t count, int64_t width,
             float* sums) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    Vec sum[4] = {Load(sums + lane)};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] = sum[j] + Load(data + offsets[i + j] + lane);
    }
    for (; i < count; ++i) sum[0] = sum[0] + Load(data + offsets[i] + lane);
    Store(sums + lane, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

bool WidenRange(const float* values, int64_t count, float* low, float* high) {
  Vec least[2] = {Broadcast(*low), Broadcast(*low)}, most[2] = {Broadcast(*high), Broadcast(*high)};
  Vec nan = Broadcast(0);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Vec value = Load(values + i + j * kLanes);
      least[j] = Min(least[j], value);
      most[j] = Max(most[j], value);
      nan = Fma(value, Broadcast(0), nan);
    }
  }
  for (; i < count; i += kLanes) {
    const Vec value = LoadFirst(values + i, count - i < kLanes ? count - i : kLanes);
    least[0] = Min(least[0], value);  // zeros behind the last, which a range always has
    most[0] = Max(most[0], value);
    nan = Fma(value, Broadcast(0), nan);
  }
  float lows[kLanes], highs[kLanes];
  Store(lows, Min(least[0], least[1]));
  Store(highs, Max(most[0], most[1]));
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lows[lane] < *low) *low = lows[lane];
    if (highs[lane] > *high) *high = highs[lane];
  }
  return !AnyNan(nan);
}

void RoundToGrid(const float* values, int64_t count, float scale, float low, float high,
                 int16_t* to) {
  const Vec least = Broadcast(low), most = Broadcast(high), factor = Broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    StoreHalves(to + i, ToIntegers(Min(Max(Load(values + i), least), most) * factor));
  }
  if (i == count) return;
  int16_t last[kLanes];
  StoreHalves(last, ToIntegers(Min(Max(LoadFirst(values + i, count - i), least), most) * factor));
  for (int64_t j = 0; i + j < count; ++j) to[i + j] = last[j];
}

void PairUp(const float* low, const float* high, int64_t count, float scale, float* to) {
  const Vec factor = Broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec second = high == nullptr ? Broadcast(0) : Load(high + i);
    Store(to + i, PairOf(ToIntegers(Load(low + i) * factor), ToIntegers(second * factor)));
  }
  if (i == count) return;
  float last[kLanes];
  const Vec second = high == nullptr ? Broadcast(0) : LoadFirst(high + i, count - i);
  Store(last, PairOf(ToIntegers(LoadFirst(low + i, count - i) * factor),
                     ToIntegers(second * factor)));
  __builtin_memcpy(to + i, last, (count - i) * sizeof(float));
}

#if defined(__AVX512VNNI__)
inline constexpr bool kAddsProducts = true;
#else
inline constexpr bool kAddsProducts = false;
#endif

}  // namespace

const Kernels kKernels = {
    JADDER_NAME(JADDER_ISA), kLanes, kForwardRows, kForwardVectors, kWideSums, kGradientRows,
    kPairMaxRows, kPairClipRows, kAddsProducts, RunProduct, RunLanewiseProduct, RowSums, PairSums,
    RunOuter, RunLanewiseOuter, RunPixels, Transpose, PlaneSums, AddRows, WidenRange, RoundToGrid, PairUp};

}  // namespace jadder::JADDER_ISA
