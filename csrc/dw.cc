// Gradients for w: sums over all positions of a matrix or an image batch.
//
// The result is small and the sum long, so the positions are cut into slices whose number depends
// on the shapes alone: each slice sums into memory of its own, and the slices are added in order.
// The result is therefore the same on any number of threads. The full-precision rule needs the
// product xᵀ g and Σ g, at the speed of a matrix product; a bounded rule costs three operations a
// term as the gradient for x does. Both read x as rows that overlap, never as patches.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <type_traits>

#include "gather.h"
#include "products.h"
#include "types.h"

namespace jadder {
namespace {

constexpr int64_t kMostSlices = 16;
constexpr int64_t kSliceFloats = 1024 * 1024;  // most floats of all slices, but for one
constexpr int64_t kBlockPositions = 256;       // read again for each tile of the result

// Σ over positions, for `matrices` results of depth × columns. Position i of matrix m is known to
// `locate`, which fills in the positions of units [begin, end); a unit is a row of positions.
struct OuterSum {
  int64_t matrices, depth, columns;
  int64_t units, unit_positions;
  int64_t width;          // floats of a term: a vector if lane-wise
  int64_t all_columns;    // of all matrices, if they share rows: the last may have fewer
  std::vector<Run> runs;  // of the depth, within a position's x
  std::function<void(int64_t m, int64_t begin, int64_t end, Pixels& pixels)> locate;

  int64_t used_columns(int64_t m) const {
    return all_columns == 0 ? columns : std::min(columns, all_columns - m * columns);
  }
  int64_t units_at_once() const { return UnitsAtOnce(unit_positions); }
  static int64_t UnitsAtOnce(int64_t positions) {
    return std::max<int64_t>(1, kBlockPositions / positions);
  }
};

// g of some positions as floats in whole vectors.
template <typename T>
const float* PaddedRows(const T* g, int64_t columns, int64_t padded, Pixels& pixels) {
  float* copy = ThreadBuffer<OuterSum>(CheckedProduct(pixels.count, padded));
  for (int64_t i = 0; i < pixels.count; ++i) {
    const T* from = g + pixels.offset[i];
    float* to = copy + i * padded;
    for (int64_t c = 0; c < columns; ++c) to[c] = ToFloat(from[c]);
    std::fill(to + columns, to + padded, 0.0f);
    pixels.target_offset[i] = i * padded;
  }
  return copy;
}

// Adds the positions at hand to `sum`, depth × padded, for columns [first, last).
void AddPositions(const Kernels& kernels, const Form& form, const OuterSum& outer, int64_t padded,
                  const Pixels& pixels, const float* g, const int64_t* g_offset,
                  const float* w, bool x_is_finite, bool add, int64_t first, int64_t last,
                  float* sum, float step = 0) {
  const bool product = form.product == Product::kOuter || form.product == Product::kPairOuter;
  const int64_t most = product ? kernels.forward_rows : kernels.gradient_rows;
  const int64_t vectors = product && !form.lanewise ? kernels.forward_vectors : 1;
  OuterTile tile = {};
  tile.x = pixels.row.data();
  tile.positions = pixels.count;
  tile.out_stride = padded;
  tile.add = add;
  tile.bound = form.limit;
  tile.x_is_finite = x_is_finite;
  tile.g_offsets = g_offset;
  tile.step = step;
  int64_t depth = 0;
  for (const Run& run : outer.runs) {
    const int64_t tiles = CeilDiv(run.length, most);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = run.length * t / tiles, rows = run.length * (t + 1) / tiles - row;
      tile.x_offset = run.offset + row * outer.width;
      for (int64_t column = first; column < last;) {
        const int64_t here = std::min(vectors, (last - column) / kernels.lanes);
        tile.g = g + column;
        tile.out = sum + (depth + row) * padded + column;
        tile.targets = w == nullptr ? nullptr : w + (depth + row) * padded + column;
        if (form.lanewise) {
          kernels.lanewise_outer(form.product, static_cast<int>(rows), tile);
        } else {
          kernels.outer(form.product, static_cast<int>(rows), static_cast<int>(here), tile);
        }
        column += here * kernels.lanes;
      }
    }
    depth += run.length;
  }
}

bool RowsAreFinite(const Kernels& kernels, const OuterSum& outer, const Pixels& pixels) {
  for (int64_t i = 0; i < pixels.count; ++i) {
    for (Run run : outer.runs) {
      run.length *= outer.width;
      Tile tile = {};
      tile.rows = &pixels.row[i];
      tile.runs = &run;
      tile.num_runs = 1;
      float sum;
      kernels.row_sums(tile, 1, &sum);
      if (!std::isfinite(sum)) return false;
    }
  }
  return true;
}

// Positions two by two, as pairs of integers with steps of their own: few enough for sums in 32 bits.
struct PairedPositions {
  static constexpr float kSteps = 2047, kGradientSteps = 4095;  // · · 2 · kChunkPositions < 2^31
  static_assert(2047 * 4095 < (int64_t{1} << 31) / (2 * kChunkPositions));

  Pixels pixels;  // of the pairs; offsets are those in g
  const float* g = nullptr;
  float step = 0;

  // False where the positions at hand have no such pairs, or would not repay them.
  bool Find(const Kernels& kernels, const OuterSum& outer, const Pixels& from, const float* g_rows,
            const int64_t* g_offset, int64_t first, int64_t last) {
    if (from.count < 2) return false;
    const int64_t columns = last - first;
    const auto [lowest, highest] = std::minmax_element(from.row.data(),
                                                       from.row.data() + from.count);
    const float* begin = *lowest;
    const int64_t reach = outer.runs.back().offset + outer.runs.back().length;
    const int64_t size = *highest - begin + reach, stride = from.row[1] - from.row[0];
    if (stride < 0 || 24 * size > from.count * outer.depth * columns) return false;
    Range x, gradient;
    x.finite = kernels.widen_range(begin, size, &x.low, &x.high);
    for (int64_t i = 0, next; i < from.count; i = next) {  // rows that lie one after another
      for (next = i + 1; next < from.count; ++next) {
        if (g_offset[next] - g_offset[next - 1] != columns) break;
      }
      gradient.finite &= kernels.widen_range(g_rows + g_offset[i] + first, (next - i) * columns,
                                             &gradient.low, &gradient.high);
    }
    const float x_scale = kSteps / x.largest(), g_scale = kGradientSteps / gradient.largest();
    step = 1 / x_scale / g_scale;
    if (!x.finite || !gradient.finite || !std::isnormal(x_scale) || !std::isnormal(g_scale) ||
        !(std::isnormal(step))) {
      return false;
    }
    float* x_pairs = ThreadBuffer<PairedPositions>(size + from.count * columns);
    float* g_pairs = x_pairs + size;
    const int64_t both = std::max<int64_t>(0, size - stride);
    kernels.pair_up(begin, begin + stride, both, x_scale, x_pairs);
    kernels.pair_up(begin + both, nullptr, size - both, x_scale, x_pairs + both);
    pixels.Reserve(from.count);
    pixels.count = 0;
    for (int64_t i = 0; i < from.count; ++i, ++pixels.count) {
      const bool pair = i + 1 < from.count && from.row[i + 1] - from.row[i] == stride;
      const float* low = g_rows + g_offset[i] + first;
      const float* high = pair ? g_rows + g_offset[i + 1] + first : nullptr;
      pixels.row[pixels.count] = x_pairs + (from.row[i] - begin);
      pixels.offset[pixels.count] = pixels.count * columns - first;
      kernels.pair_up(low, high, columns, g_scale, g_pairs + pixels.count * columns);
      i += pair;
    }
    g = g_pairs;
    return true;
  }
};

// AddPositions of pairs, by as many as fit.
void AddPairs(const Kernels& kernels, Form form, const OuterSum& outer, int64_t padded,
              const PairedPositions& paired, bool add, int64_t first, int64_t last, float* sum) {
  form.product = Product::kPairOuter;
  Pixels some;
  some.Reserve(kChunkPositions);
  for (int64_t i = 0; i < paired.pixels.count; i += kChunkPositions) {
    some.count = std::min<int64_t>(kChunkPositions, paired.pixels.count - i);
    std::copy_n(paired.pixels.row.data() + i, some.count, some.row.data());
    AddPositions(kernels, form, outer, padded, some, paired.g, paired.pixels.offset.data() + i,
                 nullptr, true, add || i > 0, first, last, sum, paired.step);
  }
}

// dw of matrix m lies at dw_at(m) and w of it at w_at(m), rows `stride` apart.
template <typename T>
void SumOuter(const Kernels& kernels, Pool& pool, const OuterSum& outer, double scale,
              double bound, bool pairs, const T* w, const T* g, float* dw, int64_t stride,
              const std::function<int64_t(int64_t)>& w_at,
              const std::function<int64_t(int64_t)>& dw_at) {
  Form form = Form::Gradient(scale, bound);
  const bool linear = form.product == Product::kLinear;
  if (linear) form.product = Product::kOuter;
  form.lanewise = outer.width > 1;
  const int64_t depth = outer.depth;
  const int64_t padded = CeilDiv(outer.columns, kernels.lanes) * kernels.lanes;
  const int64_t size = CheckedProduct(depth + 1, padded);  // the last row is Σ g

  const int64_t fit = std::max<int64_t>(1, kSliceFloats / CheckedProduct(size, outer.matrices));
  const int64_t blocks = CeilDiv(outer.units * outer.unit_positions, kBlockPositions);
  const int64_t slices = std::max<int64_t>(1, std::min({kMostSlices, fit, blocks, outer.units}));
  const int64_t wanted = CeilDiv(pool.threads() * 2, slices * outer.matrices);
  const int64_t column_parts = std::min(wanted, CeilDiv(padded, 2 * kernels.lanes));

  Buffer<float> sums(CheckedProduct(CheckedProduct(size, slices), outer.matrices));
  Buffer<float> padded_w;
  if (!linear) {
    padded_w.Resize(CheckedProduct(CheckedProduct(depth, padded), outer.matrices));
    for (int64_t m = 0; m < outer.matrices; ++m) {
      const int64_t columns = outer.used_columns(m);
      for (int64_t k = 0; k < depth; ++k) {
        float* to = padded_w.data() + (m * depth + k) * padded;
        const T* from = w + w_at(m) + k * stride;
        for (int64_t c = 0; c < columns; ++c) to[c] = ToFloat(from[c]);
        std::fill(to + columns, to + padded, 0.0f);
      }
    }
  }

  ParallelFor(pool, outer.matrices * slices * column_parts, [&](int64_t task) {
    const int64_t part = task % column_parts, slice = task / column_parts % slices;
    const int64_t m = task / column_parts / slices, columns = outer.used_columns(m);
    const int64_t vectors = padded / kernels.lanes;
    const int64_t first = vectors * part / column_parts * kernels.lanes;
    const int64_t last = vectors * (part + 1) / column_parts * kernels.lanes;
    const int64_t begin = outer.units * slice / slices, end = outer.units * (slice + 1) / slices;
    float* sum = sums.data() + (m * slices + slice) * size;
    float* g_sum = sum + depth * padded;
    std::fill(g_sum + first, g_sum + last, 0.0f);
    static thread_local Pixels pixels;
    const int64_t step = outer.units_at_once();
    for (int64_t unit = begin; unit < end; unit += step) {
      outer.locate(m, unit, std::min(end, unit + step), pixels);
      const float* g_rows = nullptr;
      const int64_t* g_offset = pixels.offset.data();
      if constexpr (std::is_same_v<T, float>) g_rows = g;
      if (padded != columns || !std::is_same_v<T, float>) {
        g_rows = PaddedRows(g, columns, padded, pixels);
        g_offset = pixels.target_offset.data();
      }
      const bool x_is_finite = linear || RowsAreFinite(kernels, outer, pixels);
      const float* w_rows = linear ? nullptr : padded_w.data() + m * depth * padded;
      static thread_local PairedPositions paired;
      if (linear && pairs && kernels.adds_products && !form.lanewise &&
          paired.Find(kernels, outer, pixels, g_rows, g_offset, first, last)) {
        AddPairs(kernels, form, outer, padded, paired, unit > begin, first, last, sum);
      } else {
        AddPositions(kernels, form, outer, padded, pixels, g_rows, g_offset, w_rows,
                     x_is_finite, unit > begin, first, last, sum);
      }
      if (linear) {
        kernels.add_rows(g_rows + first, g_offset, pixels.count, last - first, g_sum + first);
      }
    }
  });

  for (int64_t m = 0; m < outer.matrices; ++m) {
    const float* first = sums.data() + m * slices * size;
    for (int64_t slice = 1; slice < slices; ++slice) {
      for (int64_t i = 0; i < size; ++i) sums[m * slices * size + i] += first[slice * size + i];
    }
    const float* g_sum = first + depth * padded;
    const int64_t columns = outer.used_columns(m);
    for (int64_t k = 0; k < depth; ++k) {
      float* to = dw + dw_at(m) + k * stride;
      const T* from = w + w_at(m) + k * stride;
      for (int64_t c = 0; c < columns; ++c) {
        const float sum = first[k * padded + c];
        to[c] = linear ? form.factor * (sum - ToFloat(from[c]) * g_sum[c]) : -form.factor * sum;
      }
    }
  }
}

}  // namespace

template <typename T>
void MatmulDw(const Kernels& kernels, Pool& pool, const MatmulShape& s, double scale, double bound,
              bool pairs, const T* x, const T* w, const T* g, float* dw) {
  const int64_t size = CheckedProduct(s.depth, s.columns);
  if (s.batch == 0 || size == 0) return;
  if (s.rows == 0) {
    std::fill_n(dw, CheckedProduct(s.batch, size), 0.0f);
    return;
  }
  OuterSum outer = {s.batch, s.depth, s.columns, s.rows, 1, 1, 0, {{0, s.depth}}, nullptr};
  outer.locate = [&](int64_t m, int64_t begin, int64_t end, Pixels& pixels) {
    pixels.Reserve(end - begin);
    pixels.count = end - begin;
    const int64_t first = m * s.rows + begin;
    const float* rows = nullptr;
    if constexpr (std::is_same_v<T, float>) {
      rows = x + first * s.depth;
    } else {
      float* copy = ThreadBuffer<MatmulShape>(CheckedProduct(pixels.count, s.depth));
      const T* from = x + first * s.depth;
      for (int64_t i = 0; i < pixels.count * s.depth; ++i) copy[i] = ToFloat(from[i]);
      rows = copy;
    }
    for (int64_t i = 0; i < pixels.count; ++i) {
      pixels.row[i] = rows + i * s.depth;
      pixels.offset[i] = (first + i) * s.columns;
    }
  };
  SumOuter<T>(
      kernels, pool, outer, scale, bound, pairs, w, g, dw, s.columns,
      [&](int64_t m) { return s.w_batch == 1 ? 0 : m * size; },
      [&](int64_t m) { return m * size; });
}

template <typename T>
void ConvDw(const Kernels& kernels, Pool& pool, const ConvShape& s, double scale, double bound,
            bool pairs, const T* x, const T* w, const T* g, float* dw) {
  const int64_t depth = s.window[0] * s.window[1] * (s.channels / s.groups);
  const int64_t size = CheckedProduct(depth, s.filters);
  if (size == 0) return;
  if (s.batch == 0 || s.out[0] == 0 || s.out[1] == 0) {
    std::fill_n(dw, size, 0.0f);
    return;
  }
  // The zeros of padding and dilation take part: inputs are counted with those in between.
  Gather gather(s.batch, s.groups, s.in, s.out, s.channels, s.filters);
  if (s.groups > 1 && gather.lanes < kernels.lanes) gather = gather.Lanewise(kernels.lanes);
  std::vector<Phase> phases[2];
  for (int d = 0; d < 2; ++d) {
    gather.dilation[d] = s.lhs_dilation[d];
    std::vector<int64_t> offsets;
    for (int64_t tap = 0; tap < s.window[d]; ++tap) {
      offsets.push_back(tap * s.rhs_dilation[d] - s.low_padding[d]);
    }
    phases[d] = SplitPhases(s.out[d], s.stride[d], 1, offsets);
  }
  Window window(gather, phases[0][0], phases[1][0], std::is_same_v<T, float>);
  window.Layout(gather, std::min(s.out[0], OuterSum::UnitsAtOnce(s.out[1])), s.out[1]);
  OuterSum outer = {gather.groups,
                    s.window[0] * s.window[1] * gather.terms,
                    gather.lanes,
                    s.batch * s.out[0],
                    s.out[1],
                    gather.width,
                    s.filters,
                    window.Runs(gather),
                    nullptr};
  outer.locate = [&](int64_t group, int64_t begin, int64_t end, Pixels& pixels) {
    GatherPixels(gather, window, group, begin, end - begin, 0, s.out[1], x, pixels);
  };
  const auto at = [&](int64_t group) { return group * gather.lanes; };
  SumOuter<T>(kernels, pool, outer, scale, bound, pairs, w, g, dw, s.filters, at, at);
}

template void MatmulDw(const Kernels&, Pool&, const MatmulShape&, double, double, bool, const float*,
                       const float*, const float*, float*);
template void MatmulDw(const Kernels&, Pool&, const MatmulShape&, double, double, bool, const bfloat16*,
                       const bfloat16*, const bfloat16*, float*);
template void ConvDw(const Kernels&, Pool&, const ConvShape&, double, double, bool, const float*,
                     const float*, const float*, float*);
template void ConvDw(const Kernels&, Pool&, const ConvShape&, double, double, bool, const bfloat16*,
                     const bfloat16*, const bfloat16*, float*);

}  // namespace jadder
