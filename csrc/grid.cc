#include "grid.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <mutex>
#include <type_traits>

#include "types.h"

namespace jadder {
namespace {

constexpr int64_t kBlockValues = 32 * 1024;  // of one task
constexpr int64_t kMaxSteps = 2046;          // + 1 for rounding: 32 · 2047 < 2^16
constexpr int64_t kSquareSteps = 4094;       // + 1 for rounding: 4095² · 2 · 64 < 2^31
constexpr int64_t kClipSteps = 4096;         // · 8191 · 2 · 32 < 2^31
constexpr int64_t kGradientSteps = 8191;
constexpr int64_t kFewestBoundSteps = 32;

// `values` as floats: themselves, or a copy.
template <typename T>
const float* AsFloats(const T* values, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return values;
  } else {
    float* copy = ThreadBuffer<Grid>(count);
    for (int64_t i = 0; i < count; ++i) copy[i] = ToFloat(values[i]);
    return copy;
  }
}

void ForEachBlock(Pool& pool, int64_t count, int64_t block,
                  const std::function<void(int64_t begin, int64_t end)>& task) {
  const int64_t blocks = (count + block - 1) / block;
  ParallelFor(pool, blocks, [&](int64_t i) {
    task(i * block, std::min(count, (i + 1) * block));
  });
}

// Whether floats hold 1 / step and what is computed with it.
bool IsUsable(float step) { return step == 0 || (step > 1e-30f && step < 1e30f); }

// Of values in a range, where all that is asked for is a step.
Grid Plain(const Range& range, float step) {
  Grid grid;
  grid.low = range.low;
  grid.high = range.high;
  grid.step = step;
  grid.fits = range.finite && IsUsable(step);
  return grid;
}

// Values within the grid's range, and what that takes from them added to `excess`.
template <typename T>
void CutOff(const T* values, int64_t count, const Grid& grid, float* within, float* excess) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = ToFloat(values[i]);
    within[i] = std::min(std::max(value, grid.low), grid.high);
    excess[i] += std::fabs(value - within[i]);
  }
}

}  // namespace

template <typename T>
Range FindRange(const Kernels& kernels, Pool& pool, const T* values, int64_t count) {
  Range range;
  std::mutex mutex;
  ForEachBlock(pool, count, kBlockValues, [&](int64_t begin, int64_t end) {
    Range here;
    const float* floats = AsFloats(values + begin, end - begin);
    here.finite = kernels.widen_range(floats, end - begin, &here.low, &here.high);
    std::lock_guard<std::mutex> lock(mutex);
    range.low = std::min(range.low, here.low);
    range.high = std::max(range.high, here.high);
    range.finite &= here.finite;
  });
  return range;
}

Grid Grid::ForMax(const Range& x) {
  Grid grid = Plain(x, x.high / kMaxSteps - x.low / kMaxSteps);
  if (!grid.fits) return grid;
  const int64_t least = std::lrint(grid.low * grid.inverse());
  grid.start = static_cast<int16_t>(INT16_MIN - kChunkTerms * least);
  return grid;
}

Grid Grid::ForClip(const Range& x, float bound) {
  Grid grid;
  grid.low = x.low - bound;
  grid.high = x.high + bound;
  const float largest = std::max(-grid.low, grid.high);
  const float steps = std::floor((kClipSteps - 1) * (bound / largest));
  grid.fits = x.finite && std::isfinite(largest) && steps >= kFewestBoundSteps;
  if (!grid.fits) return grid;
  grid.bound_steps = static_cast<int16_t>(steps);
  grid.step = bound / steps;
  grid.fits = IsUsable(grid.step);
  return grid;
}

Grid Grid::ForSquare(const Range& both) {
  return Plain(both, both.high / kSquareSteps - both.low / kSquareSteps);
}

Grid Grid::ForGradient(const Range& g) { return Plain(g, g.largest() / kGradientSteps); }

Grid Grid::ForLinear(const Range& w) { return Plain(w, w.largest() / (kClipSteps - 1)); }

template <typename T>
Pairs::Pairs(const Kernels& kernels, Pool& pool, const Grid& grid, const T* values, int64_t groups,
             int64_t terms) {
  const int64_t padded = 2 * PairCount(terms);
  pairs_.Resize(CheckedProduct(groups, padded));
  const auto round = [&](int64_t begin, int64_t count, int16_t* to) {
    kernels.round_to_grid(AsFloats(values + begin, count), count, grid.inverse(), grid.low,
                          grid.high, to);
  };
  if (padded == terms) {
    ForEachBlock(pool, groups * terms, kBlockValues, [&](int64_t begin, int64_t end) {
      round(begin, end - begin, pairs_.data() + begin);
    });
    return;
  }
  const int64_t block = std::max<int64_t>(1, kBlockValues / padded);
  ForEachBlock(pool, groups, block, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int16_t* to = pairs_.data() + i * padded;
      round(i * terms, terms, to);
      to[terms] = 0;
    }
  });
}

template <typename T>
PairRows::PairRows(const Kernels& kernels, Pool& pool, const Grid& grid, const T* values,
                   int64_t groups, int64_t terms, int64_t columns)
    : excess_(columns) {
  const int64_t pairs = PairCount(terms);
  pairs_.Resize(CheckedProduct(CheckedProduct(groups, pairs), columns));
  std::vector<float> cut(groups * columns);
  ParallelFor(pool, groups, [&](int64_t group) {
    float* excess = cut.data() + group * columns;
    float* row = ThreadBuffer<PairRows>(2 * columns);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t count = std::min<int64_t>(2, terms - 2 * pair);
      const T* from = values + (group * terms + 2 * pair) * columns;
      for (int64_t i = 0; i < count; ++i) {
        CutOff(from + i * columns, columns, grid, row + i * columns, excess);
      }
      kernels.pair_up(row, count == 2 ? row + columns : nullptr, columns, grid.inverse(),
                      pairs_.data() + (group * pairs + pair) * columns);
    }
  });
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t c = 0; c < columns; ++c) excess_[c] += cut[group * columns + c];
  }
}

template Range FindRange(const Kernels&, Pool&, const float*, int64_t);
template Range FindRange(const Kernels&, Pool&, const bfloat16*, int64_t);
template Pairs::Pairs(const Kernels&, Pool&, const Grid&, const float*, int64_t, int64_t);
template Pairs::Pairs(const Kernels&, Pool&, const Grid&, const bfloat16*, int64_t, int64_t);
template PairRows::PairRows(const Kernels&, Pool&, const Grid&, const float*, int64_t, int64_t,
                            int64_t);
template PairRows::PairRows(const Kernels&, Pool&, const Grid&, const bfloat16*, int64_t, int64_t,
                            int64_t);

}  // namespace jadder
