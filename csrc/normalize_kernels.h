// The innermost loops of batch normalisation, over a block of rows that a cache holds.

#pragma once

#include <cstdint>

namespace jadder {

inline constexpr int64_t kMostBlockRows = 1024;

// Rows that lie one after the other, and what to take away from each: its own mean, or nothing.
struct RowBlock {
  const float* x;
  int64_t rows;  // at most kMostBlockRows
  int64_t features;
  const float* row_means;  // or null
};

// y = factor · (x - mean) + bias, each (features,). With `rectify`, what is not positive turns zero.
struct Affine {
  const float* mean;
  const float* factor;
  const float* bias;
  bool rectify;
};

// dx = factor · g + slope · (x - mean) + offset, and then less the row's mean of that, where x has
// row means.
struct AffineGradient {
  const float* slope;
  const float* offset;
};

struct NormalizeKernels {
  const char* name;
  // The mean of each row over its features.
  void (*row_means)(const float* x, int64_t rows, int64_t features, float* means);
  // Of each feature: its mean, and of what x deviates from it the sum and that of the squares.
  void (*moments)(const RowBlock& block, float* mean, float* sum, float* squares);
  // y, with `residual` added before what is negative is cut off, unless it is null.
  void (*apply)(const RowBlock& block, const Affine& affine, const float* residual, float* y);
  // Σ g and Σ g (x - mean), over rows; g counts where y is positive, if that is rectified.
  void (*gradient_sums)(const RowBlock& block, const Affine& affine, const float* g, float* sum,
                        float* along);
  void (*gradient)(const RowBlock& block, const Affine& affine, const AffineGradient& gradient,
                   const float* g, float* dx);
};

namespace avx512 {
extern const NormalizeKernels kNormalizeKernels;
}
namespace avx2 {
extern const NormalizeKernels kNormalizeKernels;
}
namespace baseline {
extern const NormalizeKernels kNormalizeKernels;
}

// The best table that this processor can run, as for the products.
const NormalizeKernels& SelectNormalizeKernels();

}  // namespace jadder
