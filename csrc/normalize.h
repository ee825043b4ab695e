// Batch normalisation in training, and its gradient: of float32 rows that lie one after the other.
//
// Each passes over its arrays twice: for sums over the rows, and for the result. Sums are those of
// blocks of rows, added up in double precision in the order of the rows, so that results do not
// depend on the number of threads. A block's variance is that of its deviations from its own mean,
// which keeps its digits however far from zero the values lie (Chan, Golub and LeVeque, 1983).

#pragma once

#include <cstdint>

#include "normalize_kernels.h"
#include "tasks.h"

namespace jadder {

struct Normalization {
  int64_t rows, features;
  float epsilon;
  bool center;   // takes each row's own mean away before
  bool rectify;  // turns what is not positive to zero after
};

// y = scale · (x - mean) / √(var + epsilon) + bias + residual, with mean and biased variance over
// the rows. x, y and residual, which may be null, are (rows, features), others (features,).
void Normalize(const NormalizeKernels& kernels, Pool& pool, const Normalization& shape,
               const float* x, const float* scale, const float* bias, const float* residual,
               float* y, float* mean, float* var);

// The gradients for x, scale and bias, where those of y (without a residual), mean and var are g,
// g_mean and g_var.
void NormalizeGradient(const NormalizeKernels& kernels, Pool& pool, const Normalization& shape,
                       const float* x, const float* scale, const float* bias, const float* mean,
                       const float* var, const float* g, const float* g_mean, const float* g_var,
                       float* dx, float* dscale, float* dbias);

}  // namespace jadder
