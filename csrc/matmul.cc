// Matrix products.
//
// Limited by arithmetic once a block of rows meets enough columns: x is read in place, and w is
// rearranged once for each call, or by each task where few rows meet it.

#include <cstring>
#include <type_traits>
#include <vector>

#include "products.h"
#include "types.h"

namespace jadder {
namespace {

constexpr int64_t kFewRows = 64;         // too few to repay a whole copy of w
constexpr int64_t kTasksPerThread = 16;  // so that a thread that starts late delays little
constexpr int64_t kBlockRows = 480;      // most rows of a task

// How the result of one matrix is cut into tasks of `rows` rows and `panels` panels.
struct Cut {
  int64_t rows, row_tasks, panels, panel_tasks;
};

Cut CutUp(int64_t batch, int64_t rows, const PanelShape& shape, int64_t tile_rows,
          int64_t threads) {
  const double terms = double(batch) * double(rows) * double(shape.depth) * double(shape.columns);
  int64_t wanted = 1;
  if (threads > 1) {
    wanted = std::max<int64_t>(1, std::min<double>(threads * kTasksPerThread, terms / kSmall));
    wanted = CeilDiv(wanted, batch);
  }
  Cut cut;
  cut.rows = std::min(CeilDiv(CeilDiv(rows, wanted), tile_rows) * tile_rows, kBlockRows);
  cut.row_tasks = CeilDiv(rows, cut.rows);
  const int64_t parts = std::max<int64_t>(1, wanted / cut.row_tasks);
  cut.panels = CeilDiv(shape.count, std::min(shape.count, parts));
  cut.panel_tasks = CeilDiv(shape.count, cut.panels);
  return cut;
}

template <typename T>
const float* AsFloat(const T* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = ToFloat(from[i]);
  return to;
}

// out (batch, rows, columns) of streamed (batch, rows, depth), which is read value by value, the
// operand at `w` that becomes panels, and for gradients targets with the shape of out.
template <typename T>
void Multiply(const Kernels& kernels, Pool& pool, const Form& form, const MatmulShape& s,
              const PanelShape& shape, int64_t term_stride, int64_t lane_stride, const T* w,
              const T* streamed, const T* targets, float* out, const float* excess = nullptr) {
  const std::vector<int64_t> start = {0};
  const PassRuns runs(shape, {{0, shape.depth}});
  const int64_t w_size = CheckedProduct(shape.depth, shape.columns);
  const auto source = [&](int64_t i) -> PanelSource {
    return {w + i * w_size,
            !std::is_same_v<T, float>,
            &start,
            shape.depth,
            term_stride,
            lane_stride,
            nullptr,
            excess == nullptr ? nullptr : excess + i * shape.columns};
  };
  const bool lazy = s.rows <= kFewRows;
  PackedPanels packed;
  if (!lazy) packed = PackedPanels(pool, form, shape, s.w_batch, source);

  const int64_t tile_rows = form.most_rows(kernels);
  const Cut cut = CutUp(s.batch, s.rows, shape, tile_rows, pool.threads());
  const int64_t tasks = cut.row_tasks * cut.panel_tasks;  // of each matrix

  ParallelFor(pool, CheckedProduct(s.batch, tasks), [&](int64_t i) {
    const int64_t b = i / tasks, w_index = s.w_batch == 1 ? 0 : b;
    const int64_t row = i % tasks / cut.panel_tasks * cut.rows;
    const int64_t rows = std::min(cut.rows, s.rows - row);
    const int64_t panel = i % cut.panel_tasks * cut.panels;
    Panels panels = {shape, source(w_index)};
    if (!lazy) packed.Fill(w_index, panels);

    const T* from = streamed + (b * s.rows + row) * shape.depth;
    const T* target = targets == nullptr ? nullptr : targets + (b * s.rows + row) * shape.columns;
    const float *from_floats, *target_floats;
    if constexpr (std::is_same_v<T, float>) {
      from_floats = from;
      target_floats = target;
    } else {
      const int64_t from_size = rows * shape.depth;
      const int64_t target_size = target == nullptr ? 0 : rows * shape.columns;
      float* buffer = ThreadBuffer<MatmulShape>(from_size + target_size);
      from_floats = AsFloat(from, from_size, buffer);
      target_floats = AsFloat(target, target_size, buffer + from_size);
    }

    const float* row_starts[kBlockRows];
    int64_t offsets[kBlockRows];
    for (int64_t r = 0; r < rows; ++r) {
      row_starts[r] = from_floats + r * shape.depth;
      offsets[r] = r * shape.columns;
    }
    float* first = out + (b * s.rows + row) * shape.columns;
    MultiplyBlock(kernels, form, panels, runs,
                  {rows, row_starts, first, offsets, target_floats, offsets}, panel,
                  std::min(shape.count, panel + cut.panels), false);
  });
}

// Matrices that share w are one matrix.
MatmulShape MergeRows(MatmulShape s) {
  if (s.w_batch == 1) {
    s.rows = CheckedProduct(s.rows, s.batch);
    s.batch = 1;
  }
  return s;
}

// Computes y in pairs and returns true, or finds no grid for the values.
template <typename T>
bool MatmulInPairs(const Kernels& kernels, Pool& pool, MatmulShape s, Product product, const T* x,
                   const T* w, float* y) {
  const int64_t rows = s.batch * s.rows, terms = s.depth;
  if (!RepaysRounding(s.columns, 1)) return false;
  const Form form =
      Form::ForwardInPairs(product, FindRange(kernels, pool, x, rows * terms),
                           FindRange(kernels, pool, w, s.w_batch * terms * s.columns));
  if (!form.grid.fits) return false;
  const Pairs x_pairs(kernels, pool, form.grid, x, rows, terms);
  s.depth = PairCount(terms);
  const int64_t size = s.depth * s.columns;
  Buffer<float> w_pairs(CheckedProduct(s.w_batch, size));
  std::vector<float> excess;
  for (int64_t i = 0; i < s.w_batch; ++i) {
    const PairRows matrix(kernels, pool, form.grid, w + i * terms * s.columns, 1, terms, s.columns);
    std::memcpy(w_pairs.data() + i * size, matrix.data(), size * sizeof(float));
    excess.insert(excess.end(), matrix.excess().begin(), matrix.excess().end());
  }
  const PanelShape shape(kernels, form, s.depth, s.columns);
  Multiply<float>(kernels, pool, form, s, shape, s.columns, 1, w_pairs.data(), x_pairs.data(),
                  nullptr, y, excess.data());
  return true;
}

// Likewise dx, whose x stays as it is.
bool MatmulDxInPairs(const Kernels& kernels, Pool& pool, MatmulShape s, Form form, const float* x,
                     const float* w, const float* g, float* dx) {
  const int64_t rows = s.batch * s.rows, terms = s.columns;
  if (!RepaysRounding(double(s.depth) * double(terms), s.depth + terms)) return false;
  form = form.GradientInPairs(FindRange(kernels, pool, x, rows * s.depth),
                              FindRange(kernels, pool, w, s.w_batch * s.depth * terms));
  const Grid row_grid = Grid::ForGradient(FindRange(kernels, pool, g, rows * terms));
  if (!form.grid.fits || !row_grid.fits) return false;
  const Pairs g_pairs(kernels, pool, row_grid, g, rows, terms);
  const Pairs w_pairs(kernels, pool, form.grid, w, s.w_batch * s.depth, terms);
  form.row_step = row_grid.step;
  s.columns = PairCount(terms);
  const PanelShape shape(kernels, form, s.columns, s.depth);
  Multiply<float>(kernels, pool, form, s, shape, 1, s.columns, w_pairs.data(), g_pairs.data(), x,
                  dx);
  return true;
}

}  // namespace

template <typename T>
void Matmul(const Kernels& kernels, Pool& pool, const MatmulShape& given, Product product,
            const T* x, const T* w, float* y) {
  const MatmulShape s = MergeRows(given);
  if (s.batch == 0 || s.rows == 0 || s.columns == 0) return;
  if (s.depth == 0) {
    std::fill_n(y, s.batch * s.rows * s.columns, -0.0f);
    return;
  }
  if (IsOfPairs(product)) {
    if (MatmulInPairs(kernels, pool, s, product, x, w, y)) return;
    product = product == Product::kPairMax ? Product::kAbs : Product::kSquare;
  }
  const Form form = {product};
  const PanelShape shape(kernels, form, s.depth, s.columns);
  Multiply<T>(kernels, pool, form, s, shape, s.columns, 1, w, x, nullptr, y);
}

template <typename T>
void MatmulDx(const Kernels& kernels, Pool& pool, const MatmulShape& given, const Form& form,
              bool pairs, const T* x, const T* w, const T* g, float* dx) {
  const MatmulShape s = MergeRows(given);
  if (s.batch == 0 || s.rows == 0 || s.depth == 0) return;
  if (s.columns == 0) {
    std::fill_n(dx, s.batch * s.rows * s.depth, 0.0f);
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (pairs && form.product != Product::kSign &&
        MatmulDxInPairs(kernels, pool, s, form, x, w, g, dx)) {
      return;
    }
  }
  const PanelShape shape(kernels, form, s.columns, s.depth);
  Multiply<T>(kernels, pool, form, s, shape, 1, s.columns, w, g, x, dx);
}

template void Matmul(const Kernels&, Pool&, const MatmulShape&, Product, const float*,
                     const float*, float*);
template void Matmul(const Kernels&, Pool&, const MatmulShape&, Product, const bfloat16*,
                     const bfloat16*, float*);
template void MatmulDx(const Kernels&, Pool&, const MatmulShape&, const Form&, bool, const float*,
                       const float*, const float*, float*);
template void MatmulDx(const Kernels&, Pool&, const MatmulShape&, const Form&, bool,
                       const bfloat16*, const bfloat16*, const bfloat16*, float*);

}  // namespace jadder
