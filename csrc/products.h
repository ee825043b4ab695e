// The products, on arrays that lie row by row. Sizes may be zero; none is checked against another.
//
// float or bfloat16 in, float out; instantiated for both. Products of pairs round operands to a grid
// that their own range decides on, and are those of floats where there is none: see grid.h.

#pragma once

#include <cstdint>

#include "panels.h"

namespace jadder {

// y (batch, rows, columns) of x (batch, rows, depth) and w (w_batch, depth, columns), where w_batch
// is batch or 1.
struct MatmulShape {
  int64_t batch, rows, depth, columns, w_batch;
};

template <typename T>
void Matmul(const Kernels& kernels, Pool& pool, const MatmulShape& shape, Product product,
            const T* x, const T* w, float* y);

// dx (batch, rows, depth), with g (batch, rows, columns). `pairs` allows kPairClip instead of kClip.
template <typename T>
void MatmulDx(const Kernels& kernels, Pool& pool, const MatmulShape& shape, const Form& form,
              bool pairs, const T* x, const T* w, const T* g, float* dx);

// dw (batch, depth, columns), one for each matrix also where they share w. ψ(d) = clip(scale · d,
// -bound, bound), and bound = inf is the full-precision rule, for which `pairs` allows kPairOuter.
template <typename T>
void MatmulDw(const Kernels& kernels, Pool& pool, const MatmulShape& shape, double scale,
              double bound, bool pairs, const T* x, const T* w, const T* g, float* dw);

// y (batch, *out, filters) of x (batch, *in, channels) and w (*window, channels / groups, filters)
// in two spatial dimensions. out[d] is what the other sizes make it.
struct ConvShape {
  int64_t batch, channels, filters, groups;
  int64_t in[2], out[2], window[2];
  int64_t stride[2], low_padding[2], lhs_dilation[2], rhs_dilation[2];
};

template <typename T>
void Conv(const Kernels& kernels, Pool& pool, const ConvShape& shape, Product product, const T* x,
          const T* w, float* y);

// dx (batch, *in, channels), with g (batch, *out, filters).
template <typename T>
void ConvDx(const Kernels& kernels, Pool& pool, const ConvShape& shape, const Form& form,
            bool pairs, const T* x, const T* w, const T* g, float* dx);

// dw (*window, channels / groups, filters).
template <typename T>
void ConvDw(const Kernels& kernels, Pool& pool, const ConvShape& shape, double scale, double bound,
            bool pairs, const T* x, const T* w, const T* g, float* dw);

}  // namespace jadder
