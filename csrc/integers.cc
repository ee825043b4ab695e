// Matrix products and convolutions of bytes: packing and tasks, around the tiles of integers.h.
//
// Limited by arithmetic where many columns meet a row; with few, by reading x and writing y, whose
// int32 are four times as large. x is read in place or through the copies of gather.h, and w is
// rearranged once for each call.

#include "integers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "gather.h"
#include "memory.h"
#include "products.h"
#include "tasks.h"
#include "types.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jadder {
namespace {

constexpr int64_t kGroup = 8;              // terms that one lane takes together
constexpr int64_t kMostGroups = 128;       // in one pass over a tile
constexpr int64_t kTasksPerThread = 4;     // so that a slow thread delays little
constexpr int64_t kBlockRows = 768;        // most rows of a task
constexpr int64_t kCopied = 128 * 1024;    // most bytes of its copy of x, where a tile allows
constexpr int64_t kSmallTask = 1 << 20;    // terms not worth waking a thread for
constexpr int64_t kSmallPack = 64 * 1024;  // bytes neither
constexpr int64_t kLanewiseFilters = 2;    // of a group

// The terms of a sum as tiles take them: runs of x in bytes, cut into passes of about one length.
struct Passes {
  int64_t group_terms = kGroup;
  std::vector<Run> runs;
  std::vector<int64_t> first_term;              // in w, of each run
  std::vector<int64_t> first_run, first_group;  // of each pass, and their ends

  Passes() = default;
  Passes(const std::vector<Run>& whole, bool lanewise, int64_t term_bytes)
      : group_terms(lanewise ? 1 : kGroup) {
    int64_t total = 0, group = 0, term = 0;
    for (const Run& run : whole) total += Groups(run);
    const int64_t passes = CeilDiv(total, lanewise ? kMostLanewiseTerms : kMostGroups);
    first_group.push_back(0);
    for (int64_t pass = 1; pass <= passes; ++pass) first_group.push_back(total * pass / passes);
    first_run.push_back(0);
    for (Run run : whole) {
      while (run.length > 0) {
        const int64_t left = first_group[first_run.size()] - group;
        const Run part = {run.offset, std::min(run.length, left * group_terms)};
        runs.push_back(part);
        first_term.push_back(term);
        run.offset += part.length * term_bytes;
        run.length -= part.length;
        term += part.length;
        group += Groups(part);
        if (Groups(part) == left) first_run.push_back(static_cast<int64_t>(runs.size()));
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(first_run.size()) - 1; }
  int64_t groups() const { return first_group.back(); }
  int64_t groups(int64_t pass) const { return first_group[pass + 1] - first_group[pass]; }

 private:
  int64_t Groups(const Run& run) const { return CeilDiv(run.length, group_terms); }
};

// How the columns of w are cut into panels; a panel has zeros after the last column. In memory the
// passes follow one another, in a pass the panels, and in a panel the groups.
struct Columns {
  bool lanewise;
  int64_t columns, vector, full_width, group_bytes;  // the latter of one column
  int64_t count, last_used, last_width;

  Columns(const IntegerKernels& kernels, bool lanewise, int64_t columns)
      : lanewise(lanewise),
        columns(columns),
        vector(lanewise ? kernels.lanewise_width : kernels.columns),
        full_width(lanewise ? vector : vector * kernels.vectors),
        group_bytes(lanewise ? 1 : kGroup),
        count(CeilDiv(columns, full_width)),
        last_used(columns - (count - 1) * full_width),
        last_width(CeilDiv(last_used, vector) * vector) {}

  int64_t width(int64_t p) const { return p + 1 < count ? full_width : last_width; }
  int64_t used(int64_t p) const { return p + 1 < count ? full_width : last_used; }
  int64_t row_bytes() const { return ((count - 1) * full_width + last_width) * group_bytes; }
  int64_t PanelOffset(const Passes& passes, int64_t pass, int64_t p) const {
    return passes.first_group[pass] * row_bytes() +
           p * full_width * group_bytes * passes.groups(pass);
  }
};

// Where w's terms are: term t of column c is at data[taps[t / terms] + t % terms · stride + c].
template <typename T>
struct Terms {
  const T* data;
  const std::vector<int64_t>* taps;
  int64_t terms, stride, columns;

  const T* Row(int64_t t) const { return data + (*taps)[t / terms] + t % terms * stride; }
};

// Eight rows of eight bytes, turned into eight columns.
void Transpose(const uint64_t (&rows)[kGroup], uint8_t* columns) {
#if defined(__SSE2__)
  __m128i row[kGroup], pair[4], four[4];
  for (int r = 0; r < kGroup; ++r) row[r] = _mm_cvtsi64_si128(static_cast<int64_t>(rows[r]));
  for (int i = 0; i < 4; ++i) pair[i] = _mm_unpacklo_epi8(row[2 * i], row[2 * i + 1]);
  for (int i = 0; i < 2; ++i) {
    four[i] = _mm_unpacklo_epi16(pair[2 * i], pair[2 * i + 1]);
    four[2 + i] = _mm_unpackhi_epi16(pair[2 * i], pair[2 * i + 1]);
  }
  __m128i* to = reinterpret_cast<__m128i*>(columns);
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(to + 2 * i, _mm_unpacklo_epi32(four[2 * i], four[2 * i + 1]));
    _mm_storeu_si128(to + 2 * i + 1, _mm_unpackhi_epi32(four[2 * i], four[2 * i + 1]));
  }
#else
  uint8_t bytes[kGroup][kGroup];
  std::memcpy(bytes, rows, sizeof(bytes));
  for (int c = 0; c < kGroup; ++c) {
    for (int r = 0; r < kGroup; ++r) columns[c * kGroup + r] = bytes[r][c];
  }
#endif
}

// The same change to eight bytes as ToByte makes to one.
template <typename T>
constexpr uint64_t kTurned = std::is_same_v<T, int8_t> ? 0x8080808080808080 : 0;

// Eight columns of a group, of which `used` are there, as are `count` terms. Inlined, for the sake
// of callers where both are constants.
template <typename T>
inline __attribute__((always_inline)) void PackEight(const T* const (&rows)[kGroup], int64_t column,
                                                     int64_t count, int64_t used, uint8_t* to) {
  uint64_t values[kGroup] = {};
  for (int64_t r = 0; r < count; ++r) {
    uint64_t value = 0;
    std::memcpy(&value, rows[r] + column, used);
    values[r] = value ^ kTurned<T>;
  }
  Transpose(values, to);
}

// One group, of `count` terms, of columns [0, used) in a panel of `width`.
template <typename T>
void PackGroup(const T* const (&rows)[kGroup], int64_t count, int64_t used, int64_t width,
               uint8_t* panel) {
  int64_t c = 0;
  if (count == kGroup) {
    for (; c + kGroup <= used; c += kGroup) PackEight(rows, c, kGroup, kGroup, panel + c * kGroup);
  }
  for (; c < width; c += kGroup) {
    uint8_t block[kGroup * kGroup];
    if (count == kGroup && used - c == kGroup / 2) {  // as all panels of the baseline are
      PackEight(rows, c, kGroup, kGroup / 2, block);
    } else {
      PackEight(rows, c, count, std::max<int64_t>(0, std::min(kGroup, used - c)), block);
    }
    std::memcpy(panel + c * kGroup, block, std::min(kGroup, width - c) * kGroup);
  }
}

template <typename T>
void PackLanes(const T* row, int64_t used, int64_t width, uint8_t* panel) {
  for (int64_t c = 0; c < used; ++c) panel[c] = ToByte(row[c]);
  std::memset(panel + used, 0, width - used);
}

// One pass of all panels of an operand that begins at `packed`.
template <typename T>
void PackPass(const Columns& columns, const Passes& passes, const Terms<T>& w, int64_t pass,
              uint8_t* packed) {
  int64_t group = 0;
  for (int64_t i = passes.first_run[pass]; i < passes.first_run[pass + 1]; ++i) {
    const int64_t begin = passes.first_term[i], end = begin + passes.runs[i].length;
    for (int64_t t = begin; t < end; t += passes.group_terms, ++group) {
      const T* rows[kGroup] = {};
      const int64_t count = std::min(passes.group_terms, end - t);
      for (int64_t r = 0; r < count; ++r) rows[r] = w.Row(t + r);
      for (int64_t p = 0; p < columns.count; ++p) {
        const int64_t used = columns.used(p), width = columns.width(p);
        uint8_t* panel = packed + columns.PanelOffset(passes, pass, p) +
                         group * width * columns.group_bytes;
        if (columns.lanewise) {
          PackLanes(rows[0], std::min(used, w.columns), width, panel);
        } else {
          PackGroup(rows, count, used, width, panel);
        }
        for (int64_t r = 0; r < count; ++r) rows[r] += used;
      }
    }
  }
}

// Packed copies of several operands of one shape.
class PackedColumns {
 public:
  PackedColumns() = default;
  template <typename Operand>
  PackedColumns(Pool& pool, const Columns& columns, const Passes& passes, int64_t count,
                const Operand& operand)
      : size_(CheckedProduct(columns.row_bytes(), passes.groups())) {
    packed_.Resize(CheckedProduct(size_, count));
    const auto pack = [&](int64_t i) {
      const int64_t copy = i / passes.count();
      PackPass(columns, passes, operand(copy), i % passes.count(), packed_.data() + copy * size_);
    };
    const int64_t tasks = passes.count() * count;
    if (size_ * count > kSmallPack) {
      ParallelFor(pool, tasks, pack);
    } else {
      for (int64_t i = 0; i < tasks; ++i) pack(i);
    }
  }

  const uint8_t* operator[](int64_t i) const { return packed_.data() + i * size_; }

 private:
  int64_t size_ = 0;
  Buffer<uint8_t> packed_;
};

// Rows of a result and where their operands are: what one task computes.
struct ByteBlock {
  int64_t rows;
  const uint8_t* const* row;
  int64_t x_offset;
  int32_t* out;
  const int64_t* offset;  // of a row's first column in `out`
};

// Computes panels [begin, end) of the block's rows, adding to `out` if `add`.
void SumBlock(const IntegerKernels& kernels, const Columns& columns, const Passes& passes,
              const uint8_t* packed, const ByteBlock& block, int64_t begin, int64_t end, bool add) {
  const int64_t most = columns.lanewise ? kernels.lanewise_rows : kernels.rows;
  const int64_t tiles = CeilDiv(block.rows, most);
  if (tiles == 0) return;
  const int64_t tile_rows = block.rows / tiles, longer = block.rows % tiles;
  for (int64_t pass = 0; pass < passes.count(); ++pass) {
    const int64_t panel_bytes = columns.full_width * columns.group_bytes * passes.groups(pass);
    const int64_t cached = std::max<int64_t>(1, kCacheBytes / panel_bytes);
    IntegerTile tile = {};
    tile.runs = passes.runs.data() + passes.first_run[pass];
    tile.num_runs = passes.first_run[pass + 1] - passes.first_run[pass];
    tile.x_offset = block.x_offset;
    tile.add = add || pass > 0;
    for (int64_t first = begin; first < end; first += cached) {
      const int64_t last = std::min(end, first + cached);
      int64_t row = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const int rows = static_cast<int>(tile_rows + (t < longer));
        tile.rows = block.row + row;
        tile.offsets = block.offset + row;
        for (int64_t p = first; p < last; ++p) {
          tile.panel = packed + columns.PanelOffset(passes, pass, p);
          tile.out = block.out + p * columns.full_width;
          tile.used = static_cast<int>(columns.used(p));
          if (columns.lanewise) {
            kernels.lanewise_product(rows, tile);
          } else {
            kernels.product(rows, static_cast<int>(columns.width(p) / columns.vector), tile);
          }
        }
        row += rows;
      }
    }
  }
}

// How many tasks are worth it.
int64_t WantedTasks(int64_t threads, double terms) {
  if (threads == 1) return 1;
  return std::max<int64_t>(1, std::min<double>(threads * kTasksPerThread, terms / kSmallTask));
}

// A convolution. Lane-wise each vector of filters gathers the channels that it meets; otherwise a
// task gathers all channels at once, and each group reads its own.
template <typename T>
class ByteConvolution {
 public:
  ByteConvolution(const IntegerKernels& kernels, Pool& pool, const ConvShape& s, bool lanewise,
                  const T* w)
      : kernels_(kernels),
        pool_(pool),
        s_(s),
        terms_(s.channels / s.groups),
        gather_(s.batch, lanewise ? s.groups : 1, s.in, s.out, s.channels, s.filters),
        columns_(kernels, lanewise, lanewise ? kernels.lanewise_width : s.filters / s.groups),
        w_(w) {
    if (lanewise) gather_ = gather_.Lanewise(kernels.lanewise_width);
  }

  void Compute(const std::vector<Phase>& down, const std::vector<Phase>& across, const T* x,
               int32_t* y) {
    std::vector<Part> parts(down.size() * across.size());
    std::vector<int64_t> first_task;
    int64_t tasks = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      Part& part = parts[i];
      const bool in_place = std::is_same_v<T, uint8_t> && terms_ % kGroup == 0;
      part.window = Window(gather_, down[i / across.size()], across[i % across.size()], in_place);
      Prepare(static_cast<int64_t>(parts.size()), part);
      first_task.push_back(tasks);
      tasks += part.cut.tasks() * gather_.groups;
    }
    ParallelFor(pool_, tasks, [&](int64_t task) {
      const auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
      const size_t i = after - first_task.begin() - 1;
      RunTask(parts[i], task - first_task[i], x, y);
    });
  }

 private:
  // One combination of phases.
  struct Part {
    Window window;
    std::vector<int64_t> taps;  // where they begin in w
    Passes passes;
    PackedColumns packed;
    Cut cut;
    std::vector<int32_t> absent;  // -Σ |w| of the taps that meet none but zeros, if any
  };

  int64_t groups() const { return columns_.lanewise ? gather_.groups : s_.groups; }

  // Groups that a task gathers together.
  int64_t gathered_groups() const { return groups() / gather_.groups; }

  void Prepare(int64_t parts, Part& part) {
    const Phase &down = *part.window.rows, &across = *part.window.columns;
    const int64_t tap_size = CheckedProduct(terms_, s_.filters);
    for (const Tap& r : down.taps) {
      for (const Tap& c : across.taps) {
        part.taps.push_back((r.tap * s_.window[1] + c.tap) * tap_size);
      }
    }
    const int64_t taps = part.taps.size(), pixels = gather_.batch * down.count * across.count;
    const double terms = double(pixels) * double(taps) * double(terms_) * double(s_.filters);
    const int64_t wanted =
        CeilDiv(WantedTasks(pool_.threads(), terms), gather_.groups * parts);
    const int64_t tile = columns_.lanewise ? kernels_.lanewise_rows : kernels_.rows;
    const int64_t most = std::min(kBlockRows, std::max(tile, CeilDiv(pixels, wanted)));
    const int64_t panels = columns_.count * gathered_groups();
    part.cut = Cut(gather_, panels, tile, wanted, most, kCopied, part.window);
    part.passes = Passes(Runs(part.window), columns_.lanewise, gather_.width);
    if (taps != s_.window[0] * s_.window[1]) {
      if (magnitudes_.empty()) magnitudes_ = Magnitudes();
      const std::vector<uint32_t> absent = magnitudes_.Without(down, across);
      for (const uint32_t sum : absent) part.absent.push_back(static_cast<int32_t>(-sum));
    }
    part.packed = PackedColumns(pool_, columns_, part.passes, groups(), [&](int64_t group) {
      const int64_t first = group * columns_.columns;
      return Terms<T>{w_ + first, &part.taps, terms_, s_.filters, s_.filters - first};
    });
  }

  std::vector<Run> Runs(const Window& window) const {
    if (gathered_groups() == 1) return window.Runs(gather_);
    std::vector<Run> runs;
    for (size_t row = 0; row < window.rows->taps.size(); ++row) {
      for (size_t column = 0; column < window.columns->taps.size(); ++column) {
        runs.push_back({window.Offset(row, column), terms_});
      }
    }
    return runs;
  }

  // Σ_c |w| of each tap, for each filter.
  TapSums<uint32_t> Magnitudes() const {
    TapSums<uint32_t> sums(s_.window[0], s_.window[1], s_.filters);
    for (int64_t tap = 0; tap < s_.window[0] * s_.window[1]; ++tap) {
      uint32_t* to = sums.At(tap);
      for (int64_t c = 0; c < terms_; ++c) {
        const T* row = w_ + (tap * terms_ + c) * s_.filters;
        for (int64_t f = 0; f < s_.filters; ++f) to[f] += std::abs(int{row[f]});
      }
    }
    sums.AddUp();
    return sums;
  }

  void RunTask(const Part& part, int64_t task, const T* x, int32_t* y) const {
    const Cut& cut = part.cut;
    int64_t panel = task % cut.panel_tasks * cut.panels;
    const int64_t last = std::min(columns_.count * gathered_groups(), panel + cut.panels);
    task /= cut.panel_tasks;
    const int64_t column = task % cut.column_tasks * cut.columns;
    const int64_t columns = std::min(cut.columns, part.window.columns->count - column);
    task /= cut.column_tasks;
    const int64_t row = task % cut.row_tasks * cut.rows;
    const int64_t rows = std::min(cut.rows, gather_.batch * part.window.rows->count - row);
    const int64_t gathered = task / cut.row_tasks;

    static thread_local PixelsOf<uint8_t> pixels;
    GatherPixels(gather_, part.window, gathered, row, rows, column, columns, x, pixels);
    ByteBlock block = {pixels.count, pixels.row.data(), 0, y, pixels.offset.data()};
    while (panel < last) {
      const int64_t within = panel / columns_.count, begin = panel % columns_.count;
      const int64_t end = std::min(columns_.count, begin + last - panel);
      block.x_offset = within * terms_;
      block.out = y + within * columns_.columns;
      RunGroup(part, gathered * gathered_groups() + within, begin, end, block);
      panel += end - begin;
    }
  }

  // Computes panels [begin, end) of a group.
  void RunGroup(const Part& part, int64_t group, int64_t begin, int64_t end,
                const ByteBlock& block) const {
    Columns shape = columns_;
    if (shape.lanewise) shape.last_used = gather_.used_lanes(group);
    const bool add = !part.absent.empty() || part.passes.count() == 0;
    if (add) Fill(part, shape, group, begin, end, block);
    SumBlock(kernels_, shape, part.passes, part.packed[group], block, begin, end, add);
  }

  // What the sum holds before any tap that meets a source.
  void Fill(const Part& part, const Columns& shape, int64_t group, int64_t begin, int64_t end,
            const ByteBlock& block) const {
    const int64_t first = begin * shape.full_width;
    const int64_t size = (end - 1) * shape.full_width + shape.used(end - 1) - first;
    for (int64_t i = 0; i < block.rows; ++i) {
      int32_t* to = block.out + block.offset[i] + first;
      if (part.absent.empty()) {
        std::fill_n(to, size, 0);
      } else {
        std::copy_n(part.absent.data() + group * shape.columns + first, size, to);
      }
    }
  }

  const IntegerKernels& kernels_;
  Pool& pool_;
  const ConvShape& s_;
  const int64_t terms_;  // channels of a group
  Gather gather_;
  Columns columns_;
  const T* w_;
  TapSums<uint32_t> magnitudes_;
};

// How the result of one matrix is cut into tasks of `rows` rows and `panels` panels.
struct MatmulCut {
  int64_t rows, row_tasks, panels, panel_tasks;

  MatmulCut(const MatmulShape& s, const Columns& columns, int64_t tile, int64_t most,
            int64_t threads) {
    const double terms = double(s.batch) * double(s.rows) * double(s.depth) * double(s.columns);
    const int64_t wanted = CeilDiv(WantedTasks(threads, terms), s.batch);
    rows = std::min(most, CeilDiv(CeilDiv(s.rows, wanted), tile) * tile);
    row_tasks = CeilDiv(s.rows, rows);
    panels = CeilDiv(columns.count, std::min(columns.count, CeilDiv(wanted, row_tasks)));
    panel_tasks = CeilDiv(columns.count, panels);
  }

  int64_t tasks() const { return row_tasks * panel_tasks; }
};

// Rows of x as bytes, in place or copied, that tiles may read past.
template <typename T>
const uint8_t* AsBytes(const T* x, int64_t size, bool in_place) {
  if (in_place) return reinterpret_cast<const uint8_t*>(x);
  uint8_t* copy = ThreadBuffer<MatmulShape, uint8_t>(size + kGroup - 1);
  for (int64_t i = 0; i < size; ++i) copy[i] = ToByte(x[i]);
  return copy;
}

}  // namespace

template <typename T>
void IntegerMatmul(const IntegerKernels& kernels, Pool& pool, const MatmulShape& shape, const T* x,
                   const T* w, int32_t* y) {
  MatmulShape s = shape;
  if (s.w_batch == 1) {  // matrices that share w are one matrix
    s.rows = CheckedProduct(s.rows, s.batch);
    s.batch = 1;
  }
  if (s.batch == 0 || s.rows == 0 || s.columns == 0) return;
  if (s.depth == 0) {
    std::fill_n(y, s.batch * s.rows * s.columns, 0);
    return;
  }
  const Columns columns(kernels, false, s.columns);
  const Passes passes({{0, s.depth}}, false, 1);
  const std::vector<int64_t> start = {0};
  const int64_t w_size = CheckedProduct(s.depth, s.columns);
  const PackedColumns packed(pool, columns, passes, s.w_batch, [&](int64_t i) {
    return Terms<T>{w + i * w_size, &start, s.depth, s.columns, s.columns};
  });

  const bool in_place = std::is_same_v<T, uint8_t> && s.depth % kGroup == 0;
  const int64_t cached = in_place ? kBlockRows : std::min(kBlockRows, kCopied / s.depth);
  const MatmulCut cut(s, columns, kernels.rows, std::max<int64_t>(kernels.rows, cached),
                      pool.threads());
  ParallelFor(pool, CheckedProduct(s.batch, cut.tasks()), [&](int64_t i) {
    const int64_t b = i / cut.tasks(), panel = i % cut.panel_tasks * cut.panels;
    const int64_t row = i / cut.panel_tasks % cut.row_tasks * cut.rows;
    const int64_t rows = std::min(cut.rows, s.rows - row), first = b * s.rows + row;
    const uint8_t* bytes = AsBytes(x + first * s.depth, rows * s.depth, in_place);
    const uint8_t* starts[kBlockRows];
    int64_t offsets[kBlockRows];
    for (int64_t r = 0; r < rows; ++r) {
      starts[r] = bytes + r * s.depth;
      offsets[r] = r * s.columns;
    }
    SumBlock(kernels, columns, passes, packed[s.w_batch == 1 ? 0 : b],
             {rows, starts, 0, y + first * s.columns, offsets}, panel,
             std::min(columns.count, panel + cut.panels), false);
  });
}

template <typename T>
void IntegerConv(const IntegerKernels& kernels, Pool& pool, const ConvShape& s, const T* x,
                 const T* w, int32_t* y) {
  if (s.batch == 0 || s.filters == 0 || s.out[0] == 0 || s.out[1] == 0) return;
  std::vector<Phase> phases[2];
  for (int d = 0; d < 2; ++d) {
    std::vector<int64_t> offsets;
    for (int64_t tap = 0; tap < s.window[d]; ++tap) {
      offsets.push_back(tap * s.rhs_dilation[d] - s.low_padding[d]);
    }
    phases[d] = SplitPhases(s.out[d], s.stride[d], s.lhs_dilation[d], offsets);
  }
  // Groups of few filters would leave most lanes of a vector of sums idle.
  const bool lanewise = s.groups > 1 && s.filters / s.groups <= kLanewiseFilters;
  ByteConvolution<T>(kernels, pool, s, lanewise, w).Compute(phases[0], phases[1], x, y);
}

template void IntegerMatmul(const IntegerKernels&, Pool&, const MatmulShape&, const uint8_t*,
                            const uint8_t*, int32_t*);
template void IntegerMatmul(const IntegerKernels&, Pool&, const MatmulShape&, const int8_t*,
                            const int8_t*, int32_t*);
template void IntegerConv(const IntegerKernels&, Pool&, const ConvShape&, const uint8_t*,
                          const uint8_t*, int32_t*);
template void IntegerConv(const IntegerKernels&, Pool&, const ConvShape&, const int8_t*,
                          const int8_t*, int32_t*);

}  // namespace jadder
