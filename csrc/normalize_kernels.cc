// Batch normalisation of a block of rows. Compiled once for each instruction set (see simd.h).
//
// Features are taken a few vectors at a time, rows one after the other within: what is added up over
// rows stays in registers, in four sums of each feature where there is but one vector of them.

#include "normalize_kernels.h"

#include "simd.h"

namespace jadder::JADDER_ISA {
namespace {

inline constexpr int kMostVectors = 4;

// Vectors of consecutive features, of which the last may have but its first `count`.
template <int kCount, bool kIsPartial>
struct Columns {
  static constexpr int kVectors = kCount;
  static constexpr int kRows = kMostVectors / kVectors;  // that have sums of their own
  int64_t at, count;

  JADDER_INLINE Vec Get(const float* features, int v) const {
    const float* p = features + at + v * kLanes;
    return kIsPartial ? LoadFirst(p, count) : Load(p);
  }
  JADDER_INLINE void Put(float* features, int v, Vec value) const {
    float* p = features + at + v * kLanes;
    if (kIsPartial) {
      StoreFirst(p, count, value);
    } else {
      Store(p, value);
    }
  }
};

// Calls f(Columns) for all of the features.
template <class F>
JADDER_INLINE void ForColumns(int64_t features, F f) {
  int64_t at = 0;
  for (; at + kMostVectors * kLanes <= features; at += kMostVectors * kLanes) {
    f(Columns<kMostVectors, false>{at, 0});
  }
  for (; at + kLanes <= features; at += kLanes) f(Columns<1, false>{at, 0});
  if (at < features) f(Columns<1, true>{at, features - at});
}

// Calls f(j, row) for all rows, with 0 <= j < kRows.
template <int kRows, class F>
JADDER_INLINE void ForRows(int64_t rows, F f) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) f(j, row + j);
  }
  for (; row < rows; ++row) f(0, row);
}

// Sums over rows, of one vector for each of `Columns`.
template <class Columns>
struct Sums {
  Vec sum[Columns::kRows][Columns::kVectors];

  JADDER_INLINE Sums() {
    for (auto& row : sum) {
      for (Vec& each : row) each = Broadcast(0);
    }
  }
  JADDER_INLINE Vec Total(int v) const {
    if constexpr (Columns::kRows == 4) return (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
    return sum[0][v];
  }
};

// A vector for each of `Columns`.
template <class Columns>
struct Features {
  Vec value[Columns::kVectors];

  JADDER_INLINE Features(const Columns& columns, const float* features) {
    for (int v = 0; v < Columns::kVectors; ++v) value[v] = columns.Get(features, v);
  }
  JADDER_INLINE Vec operator[](int v) const { return value[v]; }
};

template <bool kCenter>
struct Rows {
  const RowBlock& block;

  // The features of a row, less its own mean.
  template <class Columns>
  JADDER_INLINE Vec Get(const Columns& columns, int64_t row, int v) const {
    const Vec x = columns.Get(block.x + row * block.features, v);
    return kCenter ? Sub(x, Broadcast(block.row_means[row])) : x;
  }
};

template <class F>
JADDER_INLINE void ForCentering(const RowBlock& block, F f) {
  if (block.row_means == nullptr) {
    f(Rows<false>{block});
  } else {
    f(Rows<true>{block});
  }
}

#define JADDER_LAMBDA __attribute__((always_inline))

void RowMeans(const float* x, int64_t rows, int64_t features, float* means) {
  const float share = 1 / static_cast<float>(features);
  for (int64_t row = 0; row < rows; ++row, x += features) {
    Vec sum = Broadcast(0);
    int64_t at = 0;
    for (; at + kLanes <= features; at += kLanes) sum = sum + Load(x + at);
    if (at < features) sum = sum + LoadFirst(x + at, features - at);
    means[row] = HorizontalSum(sum) * share;
  }
}

void Moments(const RowBlock& block, float* mean, float* sum, float* squares) {
  const Vec share = Broadcast(1 / static_cast<float>(block.rows));
  ForCentering(block, [&](const auto rows) JADDER_LAMBDA {
    ForColumns(block.features, [&](const auto columns) JADDER_LAMBDA {
      using C = decltype(columns);
      constexpr int kVectors = C::kVectors;
      Sums<C> values;
      ForRows<C::kRows>(block.rows, [&](int j, int64_t row) JADDER_LAMBDA {
        for (int v = 0; v < kVectors; ++v) {
          values.sum[j][v] = values.sum[j][v] + rows.Get(columns, row, v);
        }
      });
      Vec center[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        center[v] = values.Total(v) * share;
        columns.Put(mean, v, center[v]);
      }
      Sums<C> first, second;
      ForRows<C::kRows>(block.rows, [&](int j, int64_t row) JADDER_LAMBDA {
        for (int v = 0; v < kVectors; ++v) {
          const Vec d = Sub(rows.Get(columns, row, v), center[v]);
          first.sum[j][v] = first.sum[j][v] + d;
          second.sum[j][v] = Fma(d, d, second.sum[j][v]);
        }
      });
      for (int v = 0; v < kVectors; ++v) {
        columns.Put(sum, v, first.Total(v));
        columns.Put(squares, v, second.Total(v));
      }
    });
  });
}

template <bool kRectify, bool kAdd>
JADDER_INLINE void ApplyTo(const RowBlock& block, const Affine& affine, const float* residual,
                           float* y) {
  const Vec zero = Broadcast(0);
  ForCentering(block, [&](const auto rows) JADDER_LAMBDA {
    ForColumns(block.features, [&](const auto columns) JADDER_LAMBDA {
      using C = decltype(columns);
      const Features<C> mean(columns, affine.mean), factor(columns, affine.factor),
          bias(columns, affine.bias);
      ForRows<C::kRows>(block.rows, [&](int, int64_t row) JADDER_LAMBDA {
        const int64_t offset = row * block.features;
        for (int v = 0; v < C::kVectors; ++v) {
          Vec value = Fma(Sub(rows.Get(columns, row, v), mean[v]), factor[v], bias[v]);
          if (kAdd) value = value + columns.Get(residual + offset, v);
          if (kRectify) value = Max(zero, value);  // the second where one is NaN
          columns.Put(y + offset, v, value);
        }
      });
    });
  });
}

void Apply(const RowBlock& block, const Affine& affine, const float* residual, float* y) {
  if (affine.rectify) {
    residual == nullptr ? ApplyTo<true, false>(block, affine, residual, y)
                        : ApplyTo<true, true>(block, affine, residual, y);
  } else {
    residual == nullptr ? ApplyTo<false, false>(block, affine, residual, y)
                        : ApplyTo<false, true>(block, affine, residual, y);
  }
}

template <bool kRectify>
JADDER_INLINE void AddGradients(const RowBlock& block, const Affine& affine, const float* g,
                                float* sum, float* along) {
  ForCentering(block, [&](const auto rows) JADDER_LAMBDA {
    ForColumns(block.features, [&](const auto columns) JADDER_LAMBDA {
      using C = decltype(columns);
      const Features<C> mean(columns, affine.mean), factor(columns, affine.factor),
          bias(columns, affine.bias);
      Sums<C> first, second;
      ForRows<C::kRows>(block.rows, [&](int j, int64_t row) JADDER_LAMBDA {
        for (int v = 0; v < C::kVectors; ++v) {
          const Vec d = Sub(rows.Get(columns, row, v), mean[v]);
          Vec slope = columns.Get(g + row * block.features, v);
          if (kRectify) slope = WherePositive(Fma(d, factor[v], bias[v]), slope);
          first.sum[j][v] = first.sum[j][v] + slope;
          second.sum[j][v] = Fma(d, slope, second.sum[j][v]);
        }
      });
      for (int v = 0; v < C::kVectors; ++v) {
        columns.Put(sum, v, first.Total(v));
        columns.Put(along, v, second.Total(v));
      }
    });
  });
}

void GradientSums(const RowBlock& block, const Affine& affine, const float* g, float* sum,
                  float* along) {
  affine.rectify ? AddGradients<true>(block, affine, g, sum, along)
                 : AddGradients<false>(block, affine, g, sum, along);
}

template <bool kRectify>
JADDER_INLINE void GradientTo(const RowBlock& block, const Affine& affine,
                              const AffineGradient& gradient, const float* g, float* dx) {
  ForCentering(block, [&](const auto rows) JADDER_LAMBDA {
    ForColumns(block.features, [&](const auto columns) JADDER_LAMBDA {
      using C = decltype(columns);
      const Features<C> mean(columns, affine.mean), factor(columns, affine.factor),
          bias(columns, affine.bias), slope(columns, gradient.slope),
          offset(columns, gradient.offset);
      ForRows<C::kRows>(block.rows, [&](int, int64_t row) JADDER_LAMBDA {
        const int64_t at = row * block.features;
        for (int v = 0; v < C::kVectors; ++v) {
          const Vec d = Sub(rows.Get(columns, row, v), mean[v]);
          Vec given = columns.Get(g + at, v);
          if (kRectify) given = WherePositive(Fma(d, factor[v], bias[v]), given);
          columns.Put(dx + at, v, Fma(factor[v], given, Fma(slope[v], d, offset[v])));
        }
      });
    });
  });
}

void Gradient(const RowBlock& block, const Affine& affine, const AffineGradient& gradient,
              const float* g, float* dx) {
  affine.rectify ? GradientTo<true>(block, affine, gradient, g, dx)
                 : GradientTo<false>(block, affine, gradient, g, dx);
  if (block.row_means == nullptr) return;
  float means[kMostBlockRows];
  RowMeans(dx, block.rows, block.features, means);
  const RowBlock whole{dx, block.rows, block.features, means};
  const Rows<true> rows{whole};
  ForColumns(block.features, [&](const auto columns) JADDER_LAMBDA {
    using C = decltype(columns);
    ForRows<C::kRows>(block.rows, [&](int, int64_t row) JADDER_LAMBDA {
      for (int v = 0; v < C::kVectors; ++v) {
        columns.Put(dx + row * block.features, v, rows.Get(columns, row, v));
      }
    });
  });
}

}  // namespace

const NormalizeKernels kNormalizeKernels = {JADDER_NAME(JADDER_ISA), RowMeans, Moments, Apply,
                                            GradientSums, Gradient};

}  // namespace jadder::JADDER_ISA
