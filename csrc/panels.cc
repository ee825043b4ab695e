#include "panels.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "types.h"

namespace jadder {
namespace {

// Terms [begin, end) of panel p.
template <typename T>
void CopyPanel(const T* data, const PanelShape& shape, const PanelSource& source, int64_t p,
               int64_t begin, int64_t end, float* out) {
  const int64_t width = shape.width(p), used = shape.used(p), column = p * shape.full_width;
  const int64_t lane_stride = source.lane_stride;
  for (int64_t term = begin; term < end;) {
    const int64_t segment = term / source.segment_terms, from = term % source.segment_terms;
    const int64_t to = std::min(source.segment_terms, from + end - term);
    term += to - from;
    const T* in = data + (*source.segments)[segment] + from * source.term_stride;
    if (source.lane_offsets != nullptr) {
      for (int64_t t = from; t < to; ++t, out += width, in += source.term_stride) {
        for (int64_t c = 0; c < width; ++c) out[c] = ToFloat(in[source.lane_offsets[column + c]]);
      }
      continue;
    }
    in += column * lane_stride;
    for (int64_t t = from; t < to; ++t, out += width, in += source.term_stride) {
      if (lane_stride == 1) {
        for (int64_t c = 0; c < used; ++c) out[c] = ToFloat(in[c]);
      } else {
        for (int64_t c = 0; c < used; ++c) out[c] = ToFloat(in[c * lane_stride]);
      }
      for (int64_t c = used; c < width; ++c) out[c] = 0;
    }
  }
}

bool AllFinite(const float* values, int64_t size) {
  float check[16] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int64_t j = 0; j < 16; ++j) check[j] += values[i + j] * 0;
  }
  for (; i < size; ++i) check[0] += values[i] * 0;
  for (int64_t j = 1; j < 16; ++j) check[0] += check[j];
  return check[0] == 0;
}

// What products of pairs add to each lane: -Σ w of a pass, and in the first one the excess of all.
void SumPairs(const Form& form, const PanelShape& shape, const PanelSource& source, int64_t p,
              int64_t pass, const float* panel, float* sums) {
  const int64_t width = shape.width(p), terms = shape.pass_begin(pass + 1) - shape.pass_begin(pass);
  int64_t total[kMaxWidth] = {};
  for (int64_t t = 0; t < terms; ++t, panel += width) {
    for (int64_t c = 0; c < width; ++c) {
      int16_t pair[2];
      std::memcpy(pair, panel + c, sizeof(pair));
      total[c] += pair[0] + pair[1];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    sums[c] = -form.grid.step * static_cast<float>(total[c]);
    if (pass == 0 && c < shape.used(p)) sums[c] += source.excess[p * shape.full_width + c];
  }
}

// Writes one pass of panel p to `panel` and the sum of its terms to `sums` unless that is null;
// returns whether all values are finite.
bool PackPanel(const Form& form, const PanelShape& shape, const PanelSource& source, int64_t p,
               int64_t pass, float* panel, float* sums) {
  const int64_t begin = shape.pass_begin(pass), end = shape.pass_begin(pass + 1);
  if (source.is_bfloat16) {
    CopyPanel(static_cast<const bfloat16*>(source.data), shape, source, p, begin, end, panel);
  } else {
    CopyPanel(static_cast<const float*>(source.data), shape, source, p, begin, end, panel);
  }
  if (form.of_pairs()) {
    if (sums != nullptr) SumPairs(form, shape, source, p, pass, panel, sums);
    return true;
  }
  const int64_t width = shape.width(p), size = (end - begin) * width;
  if (sums != nullptr) {
    std::memset(sums, 0, width * sizeof(float));
    for (int64_t i = 0; i < size; i += width) {
      for (int64_t c = 0; c < width; ++c) sums[c] += panel[i + c];
    }
  }
  return AllFinite(panel, size);
}

// One pass of panels [first, last): where they lie, or a copy made now.
class PackedGroup {
 public:
  PackedGroup(const Form& form, const Panels& panels, int64_t pass, int64_t first, int64_t last)
      : finite(panels.finite), shape_(panels.shape), first_(first) {
    const int64_t begin = shape_.pass_begin(pass), terms = shape_.pass_begin(pass + 1) - begin;
    if (panels.packed != nullptr) {
      begin_ = begin;
      panel_stride_ = shape_.full_width * shape_.depth;
      packed_ = panels.packed + shape_.offset(first);
      if (panels.sums != nullptr) {
        sums_ = panels.sums + pass * shape_.padded_columns() + first * shape_.full_width;
      }
      return;
    }
    panel_stride_ = shape_.full_width * terms;
    const int64_t size = panel_stride_ * (last - first);
    float* copy = ThreadBuffer<PackedGroup>(size + (last - first) * shape_.full_width);
    float* sums = form.sums_columns() ? copy + size : nullptr;
    for (int64_t p = first; p < last; ++p) {
      float* panel_sums = sums == nullptr ? nullptr : sums + (p - first) * shape_.full_width;
      finite &= PackPanel(form, shape_, panels.source, p, pass, copy + (p - first) * panel_stride_,
                          panel_sums);
    }
    packed_ = copy;
    sums_ = sums;
  }

  const float* panel(int64_t p) const {
    return packed_ + (p - first_) * panel_stride_ + begin_ * shape_.width(p);
  }
  const float* sums(int64_t p) const {
    return sums_ == nullptr ? nullptr : sums_ + (p - first_) * shape_.full_width;
  }

  bool finite;

 private:
  const PanelShape& shape_;
  int64_t first_;
  int64_t begin_ = 0;
  int64_t panel_stride_;
  const float* packed_;
  const float* sums_ = nullptr;
};

void RunFullTile(const Kernels& kernels, const Form& form, int rows, int vectors,
                 const Tile& tile) {
  if (form.lanewise) {
    kernels.lanewise_product(form.product, rows, tile);
  } else {
    kernels.product(form.product, rows, vectors, tile);
  }
}

// Runs a tile on copies of the columns that a narrow last panel lacks.
void RunEdgeTile(const Kernels& kernels, const Form& form, int rows, int vectors, int64_t used,
                 const Tile& tile) {
  alignas(64) float out[kMaxRows][kMaxWidth] = {};
  alignas(64) float targets[kMaxRows][kMaxWidth] = {};
  int64_t offsets[kMaxRows];
  const size_t bytes = used * sizeof(float);
  for (int r = 0; r < rows; ++r) {
    offsets[r] = r * kMaxWidth;
    if (tile.add) std::memcpy(out[r], tile.out + tile.offsets[r], bytes);
    if (tile.targets != nullptr) {
      std::memcpy(targets[r], tile.targets + tile.target_offsets[r], bytes);
    }
  }
  Tile edge = tile;
  edge.out = out[0];
  edge.targets = targets[0];
  edge.offsets = edge.target_offsets = offsets;
  RunFullTile(kernels, form, rows, vectors, edge);
  for (int r = 0; r < rows; ++r) std::memcpy(tile.out + tile.offsets[r], out[r], bytes);
}

// Asks for the rows of the next tile. Where they meet one panel only, each is read once, and the
// processor's own guess at what is next comes too late.
void Prefetch(const float* const* rows, int64_t count, const Run& run) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t r = 0; r < count; ++r) {
    const float* row = rows[r] + run.offset;
    for (int64_t k = 0; k < run.length; k += kLine) __builtin_prefetch(row + k);
  }
}

}  // namespace

Form Form::Gradient(double scale, double bound) {
  const double limit = bound / scale;
  if (!(limit >= FLT_MIN)) return {Product::kSign, static_cast<float>(bound), 0};
  if (limit > FLT_MAX) return {Product::kLinear, static_cast<float>(scale), INFINITY};
  return {Product::kClip, static_cast<float>(scale), static_cast<float>(limit)};
}

Form Form::ForwardInPairs(Product product, const Range& x, const Range& w) {
  Form form = {product};
  form.grid = product == Product::kPairSquare ? Grid::ForSquare(x.And(w)) : Grid::ForMax(x);
  form.grid.fits &= w.finite;
  return form;
}

Form Form::GradientInPairs(const Range& x, const Range& w) const {
  const bool linear = product == Product::kLinear;
  Form form = *this;
  form.product = linear ? Product::kPairLinear : Product::kPairClip;
  form.grid = linear ? Grid::ForLinear(w) : Grid::ForClip(x, limit);
  form.grid.fits &= x.finite && w.finite;
  return form;
}

PackedPanels::PackedPanels(Pool& pool, const Form& form, const PanelShape& shape, int64_t count,
                           const std::function<PanelSource(int64_t)>& source)
    : size_(shape.size()), sums_size_(shape.passes() * shape.padded_columns()) {
  packed_.Resize(CheckedProduct(size_, count));
  if (form.sums_columns()) sums_.Resize(CheckedProduct(sums_size_, count));
  std::atomic<bool> finite{true};
  const auto pack = [&](int64_t i) {
    const int64_t copy = i / shape.count, p = i % shape.count;
    const PanelSource operand = source(copy);
    for (int64_t pass = 0; pass < shape.passes(); ++pass) {
      float* panel = packed_.data() + copy * size_ + shape.offset(p);
      float* sums = sums_.data();
      if (sums != nullptr) {
        sums += copy * sums_size_ + pass * shape.padded_columns() + p * shape.full_width;
      }
      panel += shape.pass_begin(pass) * shape.width(p);
      if (!PackPanel(form, shape, operand, p, pass, panel, sums)) finite = false;
    }
  };
  if (size_ * count > kSmall) {
    ParallelFor(pool, shape.count * count, pack);
  } else {
    for (int64_t i = 0; i < shape.count * count; ++i) pack(i);
  }
  finite_ = finite;
}

void PackedPanels::Fill(int64_t i, Panels& panels) const {
  panels.packed = packed_.data() + i * size_;
  panels.sums = sums_.data() == nullptr ? nullptr : sums_.data() + i * sums_size_;
  panels.finite = finite_;
}

PassRuns::PassRuns(const PanelShape& shape, const std::vector<Run>& whole, int64_t width) {
  int64_t pass = 0, term = 0;
  for (Run run : whole) {
    while (run.length > 0) {
      if (pass < shape.passes() && term == shape.pass_begin(pass)) {
        first.push_back(static_cast<int64_t>(runs.size()));
        ++pass;
      }
      const int64_t length = std::min(run.length, shape.pass_begin(pass) - term);
      runs.push_back({run.offset, length});
      run.offset += length * width;
      run.length -= length;
      term += length;
    }
  }
  first.push_back(static_cast<int64_t>(runs.size()));
}

void RunTile(const Kernels& kernels, const Form& form, const PanelShape& shape, int64_t p, int rows,
             const Tile& tile) {
  const int vectors = shape.width(p) == shape.lanes ? 1 : kernels.forward_vectors;
  if (shape.used(p) == shape.width(p)) {
    RunFullTile(kernels, form, rows, vectors, tile);
  } else {
    RunEdgeTile(kernels, form, rows, vectors, shape.used(p), tile);
  }
}

void MultiplyBlock(const Kernels& kernels, const Form& form, const Panels& panels,
                   const PassRuns& runs, const Block& block, int64_t begin, int64_t end,
                   bool add) {
  const PanelShape& shape = panels.shape;
  const int64_t most = form.most_rows(kernels);
  const int64_t tiles = CeilDiv(block.rows, most);
  if (tiles == 0) return;
  const int64_t tile_rows = block.rows / tiles, longer = block.rows % tiles;
  float row_sums[kMaxRows];

  for (int64_t pass = 0; pass < shape.passes(); ++pass) {
    const int64_t terms = shape.pass_begin(pass + 1) - shape.pass_begin(pass);
    const int64_t panel_bytes = shape.full_width * terms * int64_t{sizeof(float)};
    const int64_t group = std::max<int64_t>(1, kCacheBytes / panel_bytes);
    Tile tile = {};
    tile.runs = runs.runs.data() + runs.first[pass];
    tile.num_runs = runs.first[pass + 1] - runs.first[pass];
    tile.add = add || pass > 0;
    tile.factor = form.factor;
    tile.row_sums = row_sums;
    tile.bound = form.limit;
    tile.step = form.grid.step;
    tile.row_step = form.row_step;
    tile.start = form.grid.start;
    tile.bound_steps = form.grid.bound_steps;

    for (int64_t first = begin; first < end; first += group) {
      const int64_t last = std::min(end, first + group);
      const PackedGroup packed(form, panels, pass, first, last);
      tile.panel_is_finite = packed.finite;
      int64_t row = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const int rows = static_cast<int>(tile_rows + (t < longer));
        tile.rows = block.row + row;
        tile.offsets = block.offset + row;
        if (form.is_gradient()) tile.target_offsets = block.target_offset + row;
        if (form.sums_rows()) {
          (form.of_pairs() ? kernels.pair_sums : kernels.row_sums)(tile, rows, row_sums);
        }
        if (last - first == 1 && tile.num_runs == 1 && t + 1 < tiles) {
          Prefetch(tile.rows + rows, tile_rows, *tile.runs);
        }
        for (int64_t p = first; p < last; ++p) {
          tile.panel = packed.panel(p);
          tile.column_sums = packed.sums(p);
          tile.out = block.out + p * shape.full_width;
          if (form.is_gradient()) tile.targets = block.targets + p * shape.full_width;
          RunTile(kernels, form, shape, p, rows, tile);
        }
        row += rows;
      }
    }
  }
}

}  // namespace jadder
