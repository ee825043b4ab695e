// Convolutions, and their gradients for x, in two dimensions.
//
// Both gather: each target pixel sums over the taps of the window, and each tap reads the channels
// of one source pixel. Targets are split into phases by residue, so that strides and dilations
// never multiply inserted zeros. The product of each phase is a matrix product whose rows overlap
// in memory: no patch is ever written out. Limited by arithmetic, as that is; layers of few
// channels by the copies of gather.h.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "few_channels.h"
#include "gather.h"
#include "products.h"
#include "types.h"

namespace jadder {
namespace {

constexpr int64_t kTasksPerThread = 4;         // so that a slow thread delays little
constexpr int64_t kBlockPixels = 768;          // most targets of a task
constexpr int64_t kCopiedFloats = 128 * 1024;  // most floats of its copy, where rows allow
constexpr int64_t kFewPixels = 512;            // that one task may take whole

// How w lies in memory, seen from the lanes and terms of a gather.
struct Filters {
  int64_t term_stride, lane_stride;  // within a tap
  int64_t tap_stride, group_stride;
  int64_t window[2];
  std::vector<int64_t> lane_offsets;  // lane-wise: of each target channel
  const float* excess = nullptr;      // kPairMax: of each target channel
};

// One combination of phases: its operand and how it is cut into tasks.
struct Part {
  Window window;
  std::vector<int64_t> segments;  // where taps begin in w
  PanelShape shape;
  PassRuns runs;
  PackedPanels packed;
  bool lazy = true;
  std::vector<float> absent;  // forward: the terms of the taps that meet none but zeros, if any
  bool covered = true;        // gradient: whether each target meets a source
  Cut cut;
};

// Chooses the tasks, and with them the copy's layout.
void CutUp(const Kernels& kernels, const Form& form, const Gather& gather, int64_t parts,
           int64_t threads, Part& part) {
  const Window& window = part.window;
  const int64_t rows = window.rows->count, columns = window.columns->count;
  const int64_t pixels = gather.batch * rows * columns, panels = part.shape.count;
  const double terms = double(pixels) * double(part.shape.depth) * double(gather.target_channels);
  const int64_t tile = form.most_rows(kernels);
  int64_t wanted = 1;
  if (threads > 1) {
    wanted = std::max<int64_t>(1, std::min<double>(threads * kTasksPerThread, terms / kSmall));
    wanted = CeilDiv(wanted, gather.groups * parts);
  }
  int64_t most = std::min(kBlockPixels, std::max(tile, CeilDiv(pixels, wanted)));
  const bool whole = !form.is_gradient() && pixels <= kFewPixels && panels > 1;
  if (whole) most = pixels;

  part.cut = Cut(gather, panels, tile, wanted, most, kCopiedFloats, part.window);
  part.lazy = !form.is_gradient() && part.cut.blocks() <= 2;
}

// Row and column of the target whose lanes begin at `offset`.
void FindPixel(const Gather& gather, int64_t offset, int64_t& y, int64_t& x) {
  const int64_t place = offset / gather.target_channels % (gather.target[0] * gather.target[1]);
  y = place / gather.target[1];
  x = place % gather.target[1];
}

// Zeroes the lanes of targets that no window covers, whatever x is there, and drops them.
void DropUncovered(const Gather& gather, const Window& window, int64_t lanes, float* out,
                   Pixels& pixels) {
  int64_t kept = 0;
  for (int64_t i = 0; i < pixels.count; ++i) {
    int64_t y, x;
    FindPixel(gather, pixels.offset[i], y, x);
    if (window.rows->Meets(y / window.rows->period, gather.source[0]) &&
        window.columns->Meets(x / window.columns->period, gather.source[1])) {
      pixels.row[kept] = pixels.row[i];
      pixels.offset[kept++] = pixels.offset[i];
    } else {
      std::fill_n(out + pixels.offset[i], lanes, 0.0f);
    }
  }
  pixels.count = kept;
}

// The gradient where w is not finite: padding must not multiply NaN, so each pixel goes through its
// own taps only.
void MultiplyEachPixel(const Kernels& kernels, const Form& form, const Gather& gather,
                       const Part& part, const Panels& panels, const Block& block, int64_t begin,
                       int64_t end) {
  const PanelShape& shape = panels.shape;
  const Phase &down = *part.window.rows, &across = *part.window.columns;
  for (int64_t i = 0; i < block.rows; ++i) {
    int64_t y, x;
    FindPixel(gather, block.offset[i], y, x);
    Tile tile = {};
    tile.rows = block.row + i;
    tile.num_runs = 1;
    tile.offsets = block.offset + i;
    tile.factor = form.factor;
    tile.target_offsets = block.target_offset + i;
    tile.bound = form.limit;
    int64_t term = 0;
    for (size_t r = 0; r < down.taps.size(); ++r) {
      for (size_t c = 0; c < across.taps.size(); ++c) {
        const int64_t row = down.taps[r].start + y / down.period * down.step;
        const int64_t column = across.taps[c].start + x / across.period * across.step;
        const Run run = {part.window.Offset(r, c), gather.terms};
        if (row >= 0 && row < gather.source[0] && column >= 0 && column < gather.source[1]) {
          tile.runs = &run;
          for (int64_t p = begin; p < end; ++p) {
            tile.panel = panels.packed + shape.offset(p) + term * shape.width(p);
            tile.out = block.out + p * shape.full_width;
            tile.targets = block.targets + p * shape.full_width;
            RunTile(kernels, form, shape, p, 1, tile);
          }
          tile.add = true;
        }
        term += gather.terms;
      }
    }
  }
}

// Σ_c |w|, or Σ_c w² of kSquare, of each tap of a forward product, for each lane of each group.
template <typename T>
TapSums<float> Magnitudes(const Form& form, const Gather& gather, const Filters& filters,
                          const T* w) {
  TapSums<float> sums(filters.window[0], filters.window[1], gather.target_channels);
  for (int64_t tap = 0; tap < filters.window[0] * filters.window[1]; ++tap) {
    float* to = sums.At(tap);
    for (int64_t c = 0; c < gather.terms; ++c) {
      const T* row = w + tap * filters.tap_stride + c * filters.term_stride;
      for (int64_t f = 0; f < gather.target_channels; ++f) {
        const float value = ToFloat(row[f]);
        to[f] += form.product == Product::kSquare ? value * value : std::fabs(value);
      }
    }
  }
  sums.AddUp();
  return sums;
}

// A convolution or its gradient for x.
template <typename T>
class Convolution {
 public:
  Convolution(const Kernels& kernels, Pool& pool, const Form& form, const Gather& gather,
              const Filters& filters, const T* w)
      : kernels_(kernels), pool_(pool), form_(form), gather_(gather), filters_(filters), w_(w) {}

  // Computes `out` from `source`, and for gradients `targets`, phase by phase.
  void Run(const std::vector<Phase>& down, const std::vector<Phase>& across, const T* source,
           const T* targets, float* out) {
    std::vector<Part> parts(down.size() * across.size());
    std::vector<int64_t> first_task;
    int64_t tasks = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      Part& part = parts[i];
      part.window = Window(gather_, down[i / across.size()], across[i % across.size()],
                           std::is_same_v<T, float>);
      Prepare(static_cast<int64_t>(parts.size()), part);
      first_task.push_back(tasks);
      tasks += part.cut.tasks() * gather_.groups;
    }
    ParallelFor(pool_, tasks, [&](int64_t task) {
      const auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
      const size_t i = after - first_task.begin() - 1;
      RunTask(parts[i], task - first_task[i], source, targets, out);
    });
  }

 private:
  void Prepare(int64_t parts, Part& part) {
    const Phase &down = *part.window.rows, &across = *part.window.columns;
    const int64_t taps = down.taps.size() * across.taps.size();
    for (const Tap& r : down.taps) {
      for (const Tap& c : across.taps) {
        const int64_t tap = r.tap * filters_.window[1] + c.tap;
        part.segments.push_back(tap * filters_.tap_stride);
      }
    }
    part.shape =
        PanelShape(kernels_, form_, CheckedProduct(taps, gather_.terms), gather_.lanes);
    CutUp(kernels_, form_, gather_, parts, pool_.threads(), part);
    part.runs = PassRuns(part.shape, part.window.Runs(gather_), gather_.width);
    if (form_.is_gradient()) {
      part.covered = down.AllMeet(gather_.source[0]) && across.AllMeet(gather_.source[1]);
    } else if (taps != filters_.window[0] * filters_.window[1]) {
      if (magnitudes_.empty()) magnitudes_ = Magnitudes(form_, gather_, filters_, w_);
      part.absent = magnitudes_.Without(down, across);
    }
    if (!part.lazy) {
      part.packed = PackedPanels(pool_, form_, part.shape, gather_.groups,
                                 [&](int64_t group) { return Source(part, group); });
    }
  }

  PanelSource Source(const Part& part, int64_t group) const {
    PanelSource source = {w_, !std::is_same_v<T, float>, &part.segments, gather_.terms,
                          filters_.term_stride, filters_.lane_stride};
    if (form_.lanewise) {
      source.lane_offsets = filters_.lane_offsets.data() + group * gather_.lanes;
    } else {
      source.data = w_ + group * filters_.group_stride;
      if (filters_.excess != nullptr) source.excess = filters_.excess + group * gather_.lanes;
    }
    return source;
  }

  void RunTask(const Part& part, int64_t task, const T* source, const T* targets,
               float* out) const {
    const Cut& cut = part.cut;
    const int64_t begin = task % cut.panel_tasks * cut.panels;
    const int64_t end = std::min(part.shape.count, begin + cut.panels);
    task /= cut.panel_tasks;
    const int64_t column = task % cut.column_tasks * cut.columns;
    const int64_t columns = std::min(cut.columns, part.window.columns->count - column);
    task /= cut.column_tasks;
    const int64_t row = task % cut.row_tasks * cut.rows;
    const int64_t rows = std::min(cut.rows, gather_.batch * part.window.rows->count - row);
    const int64_t group = task / cut.row_tasks, lanes = gather_.used_lanes(group);
    PanelShape shape = part.shape;
    if (lanes < gather_.lanes) shape.last_used = lanes;  // the last of lane-wise groups

    static thread_local Pixels pixels;
    GatherPixels(gather_, part.window, group, row, rows, column, columns, source, pixels);
    const bool add = !part.absent.empty();
    if (add || shape.depth == 0) Fill(part, shape, group, begin, end, pixels, out);
    if (shape.depth == 0) return;
    if (!part.covered) DropUncovered(gather_, part.window, lanes, out, pixels);

    Block block = {pixels.count, pixels.row.data(), out, pixels.offset.data()};
    SetTargets(targets, lanes, pixels, block);
    Panels panels = {shape, Source(part, group)};
    if (!part.lazy) part.packed.Fill(group, panels);
    if (form_.is_gradient() && !panels.finite) {
      MultiplyEachPixel(kernels_, form_, gather_, part, panels, block, begin, end);
    } else {
      MultiplyBlock(kernels_, form_, panels, part.runs, block, begin, end, add);
    }
  }

  // What the sum holds before any tap that meets a source.
  void Fill(const Part& part, const PanelShape& shape, int64_t group, int64_t begin, int64_t end,
            const Pixels& pixels, float* out) const {
    const int64_t lane = begin * shape.full_width;
    const int64_t lanes = (end - 1) * shape.full_width + shape.used(end - 1) - lane;
    const float* absent = part.absent.data() + group * gather_.lanes + lane;
    for (int64_t i = 0; i < pixels.count; ++i) {
      float* to = out + pixels.offset[i] + lane;
      for (int64_t f = 0; f < lanes; ++f) {
        to[f] = part.absent.empty() ? 0 : form_.factor * absent[f];
      }
    }
  }

  void SetTargets(const T* targets, int64_t lanes, Pixels& pixels, Block& block) const {
    if constexpr (std::is_same_v<T, float>) {
      block.targets = targets;
      block.target_offset = block.offset;
    } else if (form_.is_gradient()) {
      float* copy = ThreadBuffer<Convolution>(CheckedProduct(pixels.count, lanes));
      block.targets = copy;
      block.target_offset = pixels.target_offset.data();
      for (int64_t i = 0; i < pixels.count; ++i, copy += lanes) {
        const T* from = targets + pixels.offset[i];
        for (int64_t c = 0; c < lanes; ++c) copy[c] = ToFloat(from[c]);
        pixels.target_offset[i] = i * lanes;
      }
    }
  }

  const Kernels& kernels_;
  Pool& pool_;
  const Form& form_;
  const Gather& gather_;
  const Filters& filters_;
  const T* w_;
  TapSums<float> magnitudes_;
};

// Runs group by group, or lane-wise where groups are narrower than a vector. `lane_offset` is where
// the filters of a target channel begin.
template <typename T, typename LaneOffset>
void RunConvolution(const Kernels& kernels, Pool& pool, Form form, const Gather& gather,
                    Filters filters, const std::vector<Phase> (&phases)[2], const T* w,
                    const T* source, const T* targets, float* out, LaneOffset lane_offset) {
  if (gather.groups == 1 || gather.lanes >= kernels.lanes) {
    Convolution<T>(kernels, pool, form, gather, filters, w)
        .Run(phases[0], phases[1], source, targets, out);
    return;
  }
  form.lanewise = true;
  if (form.product == Product::kMax) form.product = Product::kAbs;
  const Gather lanewise = gather.Lanewise(kernels.lanes);
  for (int64_t lane = 0; lane < lanewise.groups * lanewise.lanes; ++lane) {
    filters.lane_offsets.push_back(lane_offset(std::min(lane, gather.target_channels - 1)));
  }
  Convolution<T>(kernels, pool, form, lanewise, filters, w)
      .Run(phases[0], phases[1], source, targets, out);
}

// The forward product in a form that is prepared.
template <typename T>
void RunForward(const Kernels& kernels, Pool& pool, const ConvShape& s, const Form& form,
                const T* x, const T* w, const float* excess, float* y) {
  const Gather gather(s.batch, s.groups, s.in, s.out, s.channels, s.filters);
  const Filters filters = {s.filters, 1, gather.terms * s.filters, gather.lanes,
                           {s.window[0], s.window[1]}, {}, excess};
  std::vector<Phase> phases[2];
  for (int d = 0; d < 2; ++d) {
    std::vector<int64_t> offsets;
    for (int64_t tap = 0; tap < s.window[d]; ++tap) {
      offsets.push_back(tap * s.rhs_dilation[d] - s.low_padding[d]);
    }
    phases[d] = SplitPhases(s.out[d], s.stride[d], s.lhs_dilation[d], offsets);
  }
  RunConvolution<T>(kernels, pool, form, gather, filters, phases, w, x, nullptr, y,
                    [](int64_t filter) { return filter; });
}

// The gradient for x in a form that is prepared.
template <typename T>
void RunGradient(const Kernels& kernels, Pool& pool, const ConvShape& s, const Form& form,
                 const T* x, const T* w, const T* g, float* dx) {
  const Gather gather(s.batch, s.groups, s.out, s.in, s.filters, s.channels);
  const Filters filters = {1, s.filters, gather.lanes * s.filters, gather.terms,
                           {s.window[0], s.window[1]}, {}};
  std::vector<Phase> phases[2];
  for (int d = 0; d < 2; ++d) {
    std::vector<int64_t> offsets;
    for (int64_t tap = 0; tap < s.window[d]; ++tap) {
      offsets.push_back(s.low_padding[d] - tap * s.rhs_dilation[d]);
    }
    phases[d] = SplitPhases(s.in[d], s.lhs_dilation[d], s.stride[d], offsets);
  }
  if (ConvDxOfFewChannels<T>(kernels, pool, s, form, phases, x, w, g, dx)) return;
  RunConvolution<T>(kernels, pool, form, gather, filters, phases, w, g, x, dx,
                    [&](int64_t channel) {
                      return channel % gather.lanes * s.filters +
                             channel / gather.lanes * gather.terms;
                    });
}

// The same convolution of pairs along its channels, or along its filters.
ConvShape OfPairedChannels(ConvShape s) {
  s.channels = s.groups * PairCount(s.channels / s.groups);
  return s;
}
ConvShape OfPairedFilters(ConvShape s) {
  s.filters = s.groups * PairCount(s.filters / s.groups);
  return s;
}

double CountTerms(const ConvShape& s) {
  return double(s.batch) * double(s.out[0] * s.out[1]) * double(s.filters) *
         double(s.window[0] * s.window[1] * (s.channels / s.groups));
}

// Computes y in pairs and returns true, or finds no grid for the values.
template <typename T>
bool ConvInPairs(const Kernels& kernels, Pool& pool, const ConvShape& s, Product product,
                 const T* x, const T* w, float* y) {
  const int64_t terms = s.channels / s.groups, taps = s.window[0] * s.window[1];
  const bool lanewise = s.groups > 1 && s.filters / s.groups < kernels.lanes;
  // Dilated inputs have taps that meet zeros alone, whose sums are taken apart.
  if (lanewise || s.lhs_dilation[0] > 1 || s.lhs_dilation[1] > 1) return false;
  const int64_t pixels = s.batch * s.in[0] * s.in[1];
  if (!RepaysRounding(CountTerms(s), pixels * s.channels)) return false;
  const Form form =
      Form::ForwardInPairs(product, FindRange(kernels, pool, x, pixels * s.channels),
                           FindRange(kernels, pool, w, taps * terms * s.filters));
  if (!form.grid.fits) return false;
  const Pairs x_pairs(kernels, pool, form.grid, x, pixels * s.groups, terms);
  const PairRows w_pairs(kernels, pool, form.grid, w, taps, terms, s.filters);
  RunForward<float>(kernels, pool, OfPairedChannels(s), form, x_pairs.data(), w_pairs.data(),
                    w_pairs.excess().data(), y);
  return true;
}

// Likewise dx, whose x stays as it is.
bool ConvDxInPairs(const Kernels& kernels, Pool& pool, const ConvShape& s, Form form,
                   const float* x, const float* w, const float* g, float* dx) {
  const int64_t terms = s.filters / s.groups, lanes = s.channels / s.groups;
  if (s.groups > 1 && lanes < kernels.lanes) return false;
  if (form.product == Product::kLinear && lanes <= kMaxPixelChannels) return false;
  const int64_t taps = s.window[0] * s.window[1], pixels = s.batch * s.out[0] * s.out[1];
  const int64_t size = s.batch * s.in[0] * s.in[1] * s.channels;
  if (!RepaysRounding(CountTerms(s), size + pixels * s.filters)) return false;
  form = form.GradientInPairs(FindRange(kernels, pool, x, size),
                              FindRange(kernels, pool, w, taps * lanes * s.filters));
  const Grid rows = Grid::ForGradient(FindRange(kernels, pool, g, pixels * s.filters));
  if (!form.grid.fits || !rows.fits) return false;
  const Pairs g_pairs(kernels, pool, rows, g, pixels * s.groups, terms);
  const Pairs w_pairs(kernels, pool, form.grid, w, taps * lanes * s.groups, terms);
  form.row_step = rows.step;
  RunGradient<float>(kernels, pool, OfPairedFilters(s), form, x, w_pairs.data(), g_pairs.data(),
                     dx);
  return true;
}

}  // namespace

template <typename T>
void Conv(const Kernels& kernels, Pool& pool, const ConvShape& s, Product product, const T* x,
          const T* w, float* y) {
  if (s.batch == 0 || s.filters == 0 || s.out[0] == 0 || s.out[1] == 0) return;
  if (IsOfPairs(product)) {
    if (ConvInPairs(kernels, pool, s, product, x, w, y)) return;
    product = product == Product::kPairMax ? Product::kAbs : Product::kSquare;
  }
  RunForward<T>(kernels, pool, s, {product}, x, w, nullptr, y);
}

template <typename T>
void ConvDx(const Kernels& kernels, Pool& pool, const ConvShape& s, const Form& form, bool pairs,
            const T* x, const T* w, const T* g, float* dx) {
  if (s.batch == 0 || s.channels == 0 || s.in[0] == 0 || s.in[1] == 0) return;
  if constexpr (std::is_same_v<T, float>) {
    if (pairs && form.product != Product::kSign &&
        ConvDxInPairs(kernels, pool, s, form, x, w, g, dx)) {
      return;
    }
  }
  RunGradient<T>(kernels, pool, s, form, x, w, g, dx);
}

template void Conv(const Kernels&, Pool&, const ConvShape&, Product, const float*, const float*,
                   float*);
template void Conv(const Kernels&, Pool&, const ConvShape&, Product, const bfloat16*,
                   const bfloat16*, float*);
template void ConvDx(const Kernels&, Pool&, const ConvShape&, const Form&, bool, const float*,
                     const float*, const float*, float*);
template void ConvDx(const Kernels&, Pool&, const ConvShape&, const Form&, bool, const bfloat16*,
                     const bfloat16*, const bfloat16*, float*);

}  // namespace jadder
