#include "normalize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "memory.h"

namespace jadder {
namespace {

// Of a block: few enough for a cache, and enough for sums over rows to be worth their adding up.
constexpr int64_t kBlockValues = 4096;
constexpr int64_t kLeastSumRows = 64;
constexpr int64_t kTaskValues = 8 * kBlockValues;
constexpr int64_t kFeaturesInTask = 64;

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t BlockRows(int64_t features, int64_t least) {
  return std::clamp(kBlockValues / features, least, kMostBlockRows);
}

struct Block {
  int64_t index, first, rows;
};

// Calls f(block) for all blocks of rows, those of a task in order; from the last task to the first
// if `backwards`, since a pass has left the end of its arrays in the caches.
void ForBlocks(Pool& pool, const Normalization& shape, int64_t block_rows, bool backwards,
               const std::function<void(const Block&)>& f) {
  const int64_t blocks = CeilDiv(shape.rows, block_rows);
  const int64_t in_task = std::max<int64_t>(1, kTaskValues / (block_rows * shape.features));
  const int64_t tasks = CeilDiv(blocks, in_task);
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t first = (backwards ? tasks - 1 - task : task) * in_task;
    const int64_t last = std::min(blocks, first + in_task);
    for (int64_t i = first; i < last; ++i) {
      f({i, i * block_rows, std::min(block_rows, shape.rows - i * block_rows)});
    }
  });
}

// The block's rows of x, with their means in `means` if they are to be taken away.
RowBlock RowsOf(const NormalizeKernels& kernels, const Normalization& shape, const Block& block,
                const float* x, float* means) {
  const RowBlock rows{x + block.first * shape.features, block.rows, shape.features,
                      shape.center ? means : nullptr};
  if (shape.center) kernels.row_means(rows.x, rows.rows, rows.features, means);
  return rows;
}

// Each feature's 1 / √(var + epsilon), and that times scale.
struct Factors {
  Buffer<float> inverse, factor;

  Factors(const Normalization& shape, const float* scale, const float* var)
      : inverse(shape.features), factor(shape.features) {
    for (int64_t i = 0; i < shape.features; ++i) {
      inverse[i] = 1 / std::sqrt(var[i] + shape.epsilon);
      factor[i] = inverse[i] * scale[i];
    }
  }
};

// Rows of (features,), `count` of them for each block.
struct Partial {
  int64_t features, count;
  Buffer<float> values;

  Partial(int64_t blocks, int64_t features, int64_t count)
      : features(features), count(count), values(CheckedProduct(blocks * count, features)) {}
  float* Of(int64_t block, int64_t which) {
    return values.data() + (block * count + which) * features;
  }
};

// Calls f(feature) for all.
void ForFeatures(Pool& pool, int64_t features, const std::function<void(int64_t)>& f) {
  ParallelFor(pool, CeilDiv(features, kFeaturesInTask), [&](int64_t task) {
    const int64_t first = task * kFeaturesInTask;
    const int64_t last = std::min(features, first + kFeaturesInTask);
    for (int64_t i = first; i < last; ++i) f(i);
  });
}

void Statistics(const NormalizeKernels& kernels, Pool& pool, const Normalization& shape,
                const float* x, float* mean, float* var) {
  const int64_t block_rows = BlockRows(shape.features, kLeastSumRows);
  const int64_t blocks = CeilDiv(shape.rows, block_rows);
  Partial partial(blocks, shape.features, 3);
  ForBlocks(pool, shape, block_rows, false, [&](const Block& block) {
    float means[kMostBlockRows];
    kernels.moments(RowsOf(kernels, shape, block, x, means), partial.Of(block.index, 0),
                    partial.Of(block.index, 1), partial.Of(block.index, 2));
  });
  const auto rows_of = [&](int64_t block) {
    return static_cast<double>(std::min(block_rows, shape.rows - block * block_rows));
  };
  ForFeatures(pool, shape.features, [&](int64_t i) {
    // A block's mean is rounded: its deviations have a sum, unless it is not finite.
    const auto total_of = [&](int64_t block) {
      const double rounded = partial.Of(block, 0)[i];
      return rows_of(block) * rounded + (std::isfinite(rounded) ? partial.Of(block, 1)[i] : 0);
    };
    const double rows = static_cast<double>(shape.rows);
    double total = 0, squares = 0;
    for (int64_t b = 0; b < blocks; ++b) total += total_of(b);
    const double center = total / rows;
    for (int64_t b = 0; b < blocks; ++b) {
      const double sum = partial.Of(b, 1)[i], apart = total_of(b) / rows_of(b) - center;
      squares += partial.Of(b, 2)[i] - sum * sum / rows_of(b) + rows_of(b) * apart * apart;
    }
    mean[i] = static_cast<float>(center);
    var[i] = static_cast<float>(squares < 0 ? 0 : squares / rows);
  });
}

}  // namespace

void Normalize(const NormalizeKernels& kernels, Pool& pool, const Normalization& shape,
               const float* x, const float* scale, const float* bias, const float* residual,
               float* y, float* mean, float* var) {
  if (shape.features == 0) return;
  Statistics(kernels, pool, shape, x, mean, var);
  const Factors factors(shape, scale, var);
  const Affine affine{mean, factors.factor.data(), bias, shape.rectify};
  ForBlocks(pool, shape, BlockRows(shape.features, 1), true, [&](const Block& block) {
    float means[kMostBlockRows];
    const int64_t at = block.first * shape.features;
    kernels.apply(RowsOf(kernels, shape, block, x, means), affine,
                  residual == nullptr ? nullptr : residual + at, y + at);
  });
}

void NormalizeGradient(const NormalizeKernels& kernels, Pool& pool, const Normalization& shape,
                       const float* x, const float* scale, const float* bias, const float* mean,
                       const float* var, const float* g, const float* g_mean, const float* g_var,
                       float* dx, float* dscale, float* dbias) {
  const int64_t features = shape.features;
  if (features == 0) return;
  const Factors factors(shape, scale, var);
  const Affine affine{mean, factors.factor.data(), bias, shape.rectify};
  const int64_t block_rows = BlockRows(features, kLeastSumRows);
  const int64_t blocks = CeilDiv(shape.rows, block_rows);
  Partial partial(blocks, features, 2);
  ForBlocks(pool, shape, block_rows, false, [&](const Block& block) {
    float means[kMostBlockRows];
    kernels.gradient_sums(RowsOf(kernels, shape, block, x, means), affine,
                          g + block.first * features, partial.Of(block.index, 0),
                          partial.Of(block.index, 1));
  });
  Buffer<float> slope(features), offset(features);
  ForFeatures(pool, features, [&](int64_t i) {
    double sum = 0, along = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      sum += partial.Of(b, 0)[i];
      along += partial.Of(b, 1)[i];
    }
    const double inverse = factors.inverse[i], factor = factors.factor[i];
    const double rows = static_cast<double>(shape.rows);
    dbias[i] = static_cast<float>(sum);
    dscale[i] = static_cast<float>(along * inverse);
    offset[i] = static_cast<float>((g_mean[i] - factor * sum) / rows);
    slope[i] = static_cast<float>((2.0 * g_var[i] - factor * inverse * (along * inverse)) / rows);
  });
  const AffineGradient gradient{slope.data(), offset.data()};
  ForBlocks(pool, shape, BlockRows(features, 1), true, [&](const Block& block) {
    float means[kMostBlockRows];
    const int64_t at = block.first * features;
    kernels.gradient(RowsOf(kernels, shape, block, x, means), affine, gradient, g + at, dx + at);
  });
}

}  // namespace jadder
