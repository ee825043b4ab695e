// Sums of absolute differences of bytes, exact.
//
// One instruction takes eight of them in each 64-bit lane, so these products go by groups of eight
// values of the depth. int8 operands become uint8 when they are copied, by turning the sign bit,
// which keeps every difference; so does a padding zero, which is then 0x80.

#pragma once

#include <cstdint>

#include "kernels.h"

namespace jadder {

class Pool;
struct ConvShape;
struct MatmulShape;

inline constexpr int kMaxIntegerRows = 12;

// A lane-wise tile sums into 16 bits, which hold so many differences.
inline constexpr int64_t kMostLanewiseTerms = 65535 / 255;

// One register tile: for each row r and column of the panel
//
//   out[offsets[r] + column] (-)= Σ_k |rows[r][x_offset + k] - panel[k][column]|
//
// where the sum runs over `runs` in order. Groups never cross from one run to the next: the last of
// a run may be short, and then the panel holds zeros where it lacks terms. Up to seven bytes after
// a run are read.
struct IntegerTile {
  const uint8_t* const* rows;
  int64_t x_offset;
  const Run* runs;  // offsets in bytes
  int64_t num_runs;
  const uint8_t* panel;  // of each group and column eight bytes
  int32_t* out;
  const int64_t* offsets;
  int used;  // columns that are written
  bool add;  // to what `out` holds
};

struct IntegerKernels {
  int columns;         // of a vector of sums
  int rows;            // most rows of a tile
  int vectors;         // most vectors in a row of its panel
  int lanewise_width;  // columns of a lane-wise panel
  int lanewise_rows;   // most rows of a lane-wise tile

  void (*product)(int rows, int vectors, const IntegerTile& tile);
  // A term of a row is a vector of bytes, each meeting its own column; see kernels.h.
  void (*lanewise_product)(int rows, const IntegerTile& tile);
};

namespace avx512 {
extern const IntegerKernels kIntegerKernels;
}
namespace avx2 {
extern const IntegerKernels kIntegerKernels;
}
namespace baseline {
extern const IntegerKernels kIntegerKernels;
}

// As SelectKernels().
const IntegerKernels& SelectIntegerKernels();

// y = -Σ |x - w|, wrapping around where an int32 does not hold it; T is uint8_t or int8_t.
template <typename T>
void IntegerMatmul(const IntegerKernels& kernels, Pool& pool, const MatmulShape& shape, const T* x,
                   const T* w, int32_t* y);
template <typename T>
void IntegerConv(const IntegerKernels& kernels, Pool& pool, const ConvShape& shape, const T* x,
                 const T* w, int32_t* y);

}  // namespace jadder
