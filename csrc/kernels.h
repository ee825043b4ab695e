// The innermost loops, compiled once for each instruction set and reached through a table.
//
// Everything above this interface (shapes, packing, threads) is compiled for the baseline alone.
// Code below it uses no function template of the standard library, since the linker would keep one
// copy of such a function for all instruction sets.

#pragma once

#include <cstdint>

namespace jadder {

// Most rows of any tile, and most floats of one panel row, over all instruction sets.
inline constexpr int kMaxRows = 12;
inline constexpr int kMaxWidth = 32;

// A stretch of the sum whose terms lie one after another in memory.
struct Run {
  int64_t offset;  // in floats, from a row's start
  int64_t length;  // in terms
};

enum class Product {
  kAbs,     // Σ |x - w|
  kMax,     // Σ x + Σ w - 2 Σ max(x, w): one operation less for each term, and cancellation
  kSquare,  // Σ (x - w)²
  kClip,    // Σ clip(w - x, -bound, bound) g
  kSign,    // Σ sign(w - x) g
  kLinear,  // Σ (w - x) g
  kOuter,   // Σ x g, over positions
  kPairMax,     // kMax of 16-bit integers, see below
  kPairSquare,  // kSquare of 16-bit integers
  kPairClip,    // kClip of 16-bit integers
  kPairLinear,  // kLinear of 16-bit integers
  kPairOuter,   // kOuter of 16-bit integers
};

// In the products of pairs, what is typed as a float of `rows` and `panel` is two terms, integers of
// 16 bits: instructions take twice as many of them as of floats. Code that copies operands moves
// their bits. Integers are multiples of a step, and small enough (see grid.h) for sums of
// kChunkTerms to fit: in 16 bits from `start` on for kPairMax, in 32 bits for the others. In the outer
// product the two terms are positions, and the sums of kChunkPositions fit in 32 bits.
inline constexpr int kChunkTerms = 32;
inline constexpr int kChunkPositions = 128;

// One register tile of a product: for each row r and lane of the panel
//
//   out[offsets[r] + lane] (+)= factor · Σ_k term(rows[r][k], panel[k][lane])
//
// The sum runs over `runs` in order while `panel` advances by its width for each term. In a forward
// product `rows` is x and `panel` is w. In the gradient for x, `rows` is g, `panel` is w transposed
// and `targets` is x, read at target_offsets[r] + lane.
struct Tile {
  const float* const* rows;
  const Run* runs;
  int64_t num_runs;
  const float* panel;
  float* out;
  const int64_t* offsets;
  bool add;  // to what `out` holds
  float factor;

  const float* row_sums;     // kMax: Σ_k x for each row; of pairs but kPairSquare, Σ of its integers
  const float* column_sums;  // kMax: Σ_k w for each lane; kPairMax: what to add to each lane

  const float* targets;  // of gradients
  const int64_t* target_offsets;
  float bound;           // kClip
  bool panel_is_finite;  // kClip, kSign: whether NaN can come from x alone

  float step;         // of pairs: of x and w, of w alone for kPairLinear
  float row_step;     // kPairClip, kPairLinear: of g
  int16_t start;      // kPairMax
  int16_t bound_steps;  // kPairClip: the bound, in steps
};

// One register tile of a kernel's gradient, which sums over positions p: for each row and lane
//
//   out[row][lane] (+)= Σ_p ψ(targets[row][lane] - x[p][x_offset + row]) g[g_offsets[p] + lane]
//
// where x is the input and `targets` is w, so that the result has the opposite sign. kOuter takes
// the bare product of x and g.
struct OuterTile {
  const float* const* x;
  int64_t x_offset;
  const float* g;
  const int64_t* g_offsets;
  int64_t positions;
  float* out;
  int64_t out_stride;  // from row to row, of `targets` too
  bool add;            // to what `out` holds
  const float* targets;
  float bound;       // kClip
  bool x_is_finite;  // kClip, kSign: whether NaN can come from w alone
  float step;        // kPairOuter: of x times that of g
};

// A tap of a PixelBlock: where it meets g, from a vector's start, and its first term in w.
struct PixelTap {
  int64_t g_offset, w_offset;
};

// Some target pixels of the gradient for x, as one task computes them where channels are too few to
// fill a vector. Lanes are pixels that are neighbours in a plane, and each channel c has a plane:
//
//   out[c][v · lanes + lane] = factor · Σ_tap Σ_k
//       ψ(w[tap.w_offset + k · channels + c] - x[c][v · lanes + lane])
//       · g[k][starts[v] + tap.g_offset + lane]
//
// for kClip, kSign, kLinear and kPairClip, which has Σ_k g in one more plane of g, as floats of integers.
struct PixelBlock {
  const PixelTap* taps;
  int64_t num_taps;
  int64_t terms;  // of each tap
  const float* w;
  const float* g;
  int64_t g_stride;  // from plane to plane
  const int64_t* starts;
  int64_t vectors;
  const float* x;
  float* out;
  int64_t channel_stride;  // from plane to plane, of x and out
  float factor;
  float bound;          // kClip
  float step;           // kPairClip: of x and w
  float row_step;       // kPairClip: of g
  int16_t bound_steps;  // kPairClip: the bound, in steps
};
inline constexpr int kMaxPixelChannels = 7;

// Tiles come in two kinds. In most, a term of a row is one float, which meets every lane of the
// panel. In lane-wise tiles it is a whole vector, each lane meeting its own: products whose groups
// have fewer channels than a vector has lanes, above all depthwise ones.
struct Kernels {
  const char* name;
  int lanes;            // floats in a vector
  int forward_rows;     // most rows of a tile of kAbs, kMax and kSquare
  int forward_vectors;  // most vectors in a row of its panel
  bool wide_sums;       // whether kAbs and kSquare are quicker with so many, not kMax alone
  int gradient_rows;    // most rows of a tile of gradients, whose panels are one vector wide
  int pair_max_rows;    // most rows of a tile of kPairMax and kPairSquare
  int pair_clip_rows;   // most rows of a tile of kPairClip, whose panels are too
  bool adds_products;   // in one instruction, without which kPairOuter is no quicker than kOuter

  void (*product)(Product product, int rows, int vectors, const Tile& tile);
  void (*lanewise_product)(Product product, int rows, const Tile& tile);  // not kMax
  void (*row_sums)(const Tile& tile, int rows, float* sums);
  void (*pair_sums)(const Tile& tile, int rows, float* sums);
  // `vectors` may be more than one for kOuter and kPairOuter only.
  void (*outer)(Product product, int rows, int vectors, const OuterTile& tile);
  void (*lanewise_outer)(Product product, int rows, const OuterTile& tile);
  // w is finite. At most kMaxPixelChannels channels.
  void (*pixels)(Product product, int channels, const PixelBlock& block);
  // to[c · to_stride + r] = from[r · from_stride + c]
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                    float* to, int64_t to_stride);
  // sums[i] = Σ of the integers of planes[p · stride + i] over `count` planes, for i < width, which
  // is a multiple of `lanes`.
  void (*plane_sums)(const float* planes, int64_t stride, int64_t count, int64_t width,
                     float* sums);
  // Adds `width` floats, a multiple of `lanes`, at each of the offsets to `sums`.
  void (*add_rows)(const float* data, const int64_t* offsets, int64_t count, int64_t width,
                   float* sums);
  // Widens [*low, *high] to these values; returns whether all are finite.
  bool (*widen_range)(const float* values, int64_t count, float* low, float* high);
  // The nearest integers to scale · clip(value, low, high), which fit.
  void (*round_to_grid)(const float* values, int64_t count, float scale, float low, float high,
                        int16_t* to);
  // Pairs of round(scale · low[i]) and round(scale · high[i]), or of zeros where there is no `high`.
  void (*pair_up)(const float* low, const float* high, int64_t count, float scale, float* to);
};

namespace avx512vnni {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace baseline {
extern const Kernels kKernels;
}

// The best table that this processor can run; JADDER_CPU_ISA=avx2 or =baseline asks for less.
const Kernels& SelectKernels();

}  // namespace jadder
