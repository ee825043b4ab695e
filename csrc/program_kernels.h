// The register tiles of integer programs, of which there is one set for each instruction set.
//
// A tile makes int32 sums of a few output positions and columns, in a small buffer that stays in
// the first cache, and `requantize` turns them into the result's bytes right after.

#pragma once

#include <cstdint>

#include "kernels.h"

namespace jadder {

inline constexpr int kMostTileRows = 12;

// Columns that the arrays of a requantization, and a row of sums, have room for beyond the last.
inline constexpr int64_t kColumnSlack = 64;

// For each row r and column of the panel, with the sum over the bytes k of all runs:
//
//   sums[r · sums_stride + column] = start[column] + Σ_k term(rows[r][k], panel[k][column]) - less[r]
//
// where `less` may be null. Sums wrap around; the results fit.
struct ProductTile {
  const uint8_t* const* rows;
  const Run* runs;  // offsets and lengths in bytes, the lengths multiples of the product's group
  int64_t num_runs;
  const uint8_t* panel;
  const int32_t* start;
  const int32_t* less;
  int32_t* sums;
  int64_t sums_stride;
};

// A product, uint8 by uint8 or int8, and how its tiles want their weights.
struct ProgramProduct {
  int group;           // terms that are taken together
  int columns;         // of a vector of sums
  int vectors;         // most vectors in a row of a panel
  int rows;            // most rows of a tile
  int weight_bytes;    // of one packed weight
  bool takes_maximum;  // Σ 2 max(x, w) instead of Σ |x - w|, which is Σx + Σw smaller

  // Writes `group` weights of one column: of group g, from the panel's begin.
  void (*pack)(const uint8_t* weights, int64_t width, int64_t g, int64_t column, uint8_t* panel);
  void (*run)(int rows, int vectors, const ProductTile& tile);
};

// What a row of a requantization adds: q · multiplier · 2^left_shift.
struct TileResidual {
  int32_t multiplier;
  int left_shift;
  int32_t whole;  // multiplier · 2^left_shift modulo 2^32
};

// The second half of a step: sums to bytes, or to int32.
struct RequantizeTile {
  int rows;
  int64_t column;        // the first, in the rows below
  int64_t used, stored;  // columns; those beyond `used` become zeros
  const int32_t* sums;
  int64_t sums_stride;
  const int32_t* multiplier;
  const int64_t* bias;
  const int32_t* narrow_bias;  // modulo 2^32
  int shift;
  int32_t low, high;
  bool narrow;  // whether every result before the shift fits int32
  const TileResidual* residuals;
  int64_t num_residuals;
  const uint8_t* const* residual_rows;  // of residual i from i · residual_stride
  int64_t residual_stride;
  uint8_t* const* out;       // rows of bytes, or
  int32_t* const* wide_out;  // of int32 where this is not null
};

// Σx of each of `pixels` of a row, which have `pitch` bytes.
struct PixelSums {
  const uint8_t* first;
  int64_t pixels, pitch;
  int32_t* out;  // room for one for each four bytes of the row, and kColumnSlack
};

// Σx over the windows of `count` positions of a row, from the sums of pixels in `num_rows` rows:
// out[i] is the sum over them and over `taps` pixels, `dilation` apart, from pixel i · stride.
struct WindowSums {
  const int32_t* const* rows;  // kColumnSlack more can be read
  int64_t num_rows, count, stride, dilation, taps;
  int32_t* out;
};

struct ProgramKernels {
  const char* name;
  int pitch;  // a pixel has a multiple of so many bytes
  ProgramProduct adder, multiply;
  void (*requantize)(const RequantizeTile& tile);
  void (*pixel_sums)(const PixelSums& sums);
  void (*window_sums)(const WindowSums& sums);

  // out[k] = the largest of rows[.][k], for `bytes` k; out is none of the rows.
  void (*largest)(const uint8_t* const* rows, int64_t num_rows, int64_t bytes, uint8_t* out);

  // Pointers to the first of `count` positions, and `step` bytes on from each to the next.
  void (*point_from)(uint8_t* first, int64_t step, int64_t count, uint8_t** pointers);
};

namespace avx512vnni {
extern const ProgramKernels kProgramKernels;
}
namespace avx512 {
extern const ProgramKernels kProgramKernels;
}
namespace avx2 {
extern const ProgramKernels kProgramKernels;
}
namespace baseline {
extern const ProgramKernels kProgramKernels;
}

// The best that this processor runs, or the environment variable JADDER_CPU_ISA asks for.
const ProgramKernels& SelectProgramKernels();

}  // namespace jadder
