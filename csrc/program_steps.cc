// Every operation of an integer program, over some of its positions.

#include "program_steps.h"

#include <algorithm>
#include <cstring>

namespace jadder {

Scratch::Scratch(const ScratchSizes& sizes)
    : sums(std::max<int64_t>(1, sizes.sums)),
      row_sums(std::max<int64_t>(1, sizes.row_sums)),
      x_sums(kBlockPositions),
      gathered(std::max<int64_t>(1, sizes.gathered)),
      windows(kBlockPositions),
      residuals(kBlockPositions * std::max<int64_t>(1, sizes.residuals)),
      out(kBlockPositions),
      wide_out(kBlockPositions),
      window_rows(sizes.window_rows) {}

namespace {

// Where the first position of [begin, ...) lies in rows of `width`, and each after it.
struct Walk {
  int64_t width, row, column;
  Walk(int64_t width, int64_t begin)
      : width(width), row(begin / width), column(begin % width) {}
  void Next() {
    if (++column == width) {
      column = 0;
      ++row;
    }
  }
};

class StepRun {
 public:
  StepRun(const ProgramPlan& plan, const ProgramKernels& kernels, const Step& step,
          const Place& place, Scratch& scratch)
      : plan_(plan),
        kernels_(kernels),
        step_(step),
        in_(plan.layouts[step.input]),
        out_(plan.layouts[step.output]),
        place_(place),
        scratch_(scratch) {}

  void Run(int64_t begin, int64_t end) {
    const ProgramOperation* operation = step_.operation;
    if (operation == nullptr || !is_wide()) FillBorder(begin, end);
    if (operation == nullptr) return CopyImage(begin, end);
    if (operation->kind == ProgramKind::kReshape) return Reshape(begin, end);
    for (int64_t first = begin; first < end; first += kBlockPositions) {
      const int64_t count = std::min(kBlockPositions, end - first);
      if (operation->kind == ProgramKind::kMaxPool) {
        MaxPool(first, count);
        continue;
      }
      PointToRows(first, count);
      step_.product != nullptr && !step_.depthwise ? Product(first, count) : Sums(first, count);
    }
  }

 private:
  bool is_wide() const { return step_.output + 1 == static_cast<int64_t>(plan_.layouts.size()); }
  const ProgramOperation& operation() const { return *step_.operation; }

  void FillBorder(int64_t begin, int64_t end) {
    if (out_.border_row.empty()) return;
    const uint8_t* border = out_.border_row.data();
    uint8_t* first = place_.arena + out_.offset;
    const int64_t above = out_.border[0][0], below = out_.border[0][1];
    if (begin == 0) {
      for (int64_t row = 0; row < above; ++row) {
        std::memcpy(first + row * out_.row_bytes, border, out_.row_bytes);
      }
      for (int64_t row = above + out_.height; row < above + out_.height + below; ++row) {
        std::memcpy(first + row * out_.row_bytes, border, out_.row_bytes);
      }
    }
    const int64_t left = out_.border[1][0] * out_.pitch, right = out_.border[1][1] * out_.pitch;
    if (left + right == 0) return;
    for (int64_t row = (begin + out_.width - 1) / out_.width; row * out_.width < end; ++row) {
      uint8_t* at = first + (above + row) * out_.row_bytes;
      std::memcpy(at, border, left);
      std::memcpy(at + out_.row_bytes - right, border, right);
    }
  }

  void CopyImage(int64_t begin, int64_t end) {
    const int64_t channels = out_.channels;
    const uint8_t* from = place_.image + begin * channels;
    for (Walk at(out_.width, begin); begin < end;) {
      const int64_t count = std::min(end - begin, out_.width - at.column);
      uint8_t* to = place_.arena + out_.At(at.row, at.column);
      if (channels == out_.pitch) {
        std::memcpy(to, from, count * channels);
      } else if (channels == 3 && out_.pitch == 4) {
        for (int64_t i = 0; i < count; ++i) {
          const uint8_t pixel[4] = {from[3 * i], from[3 * i + 1], from[3 * i + 2], 0};
          std::memcpy(to + 4 * i, pixel, 4);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          std::memset(to + i * out_.pitch, 0, out_.pitch);
          for (int64_t c = 0; c < channels; ++c) to[i * out_.pitch + c] = from[i * channels + c];
        }
      }
      from += count * channels;
      begin += count;
      ++at.row;
      at.column = 0;
    }
  }

  void Reshape(int64_t begin, int64_t end) {
    int64_t element = begin * out_.channels;
    Walk to(out_.width, begin);
    for (int64_t position = begin; position < end; ++position, to.Next()) {
      uint8_t* row = place_.arena + out_.At(to.row, to.column);
      for (int64_t c = 0; c < out_.channels;) {
        const Walk from(in_.width, element / in_.channels);
        const int64_t channel = element % in_.channels;
        const int64_t count = std::min(in_.channels - channel, out_.channels - c);
        std::memcpy(row + c, place_.arena + in_.At(from.row, from.column) + channel, count);
        c += count;
        element += count;
      }
      std::memset(row + out_.channels, 0, out_.pitch - out_.channels);
    }
  }

  void MaxPool(int64_t begin, int64_t count) {
    const ProgramOperation& op = operation();
    Walk at(out_.width, begin);
    for (int64_t i = 0; i < count; ++i, at.Next()) {
      const int64_t top = at.row * op.strides[0] - op.padding[0][0];
      const int64_t left = at.column * op.strides[1] - op.padding[1][0];
      uint8_t* out = place_.arena + out_.At(at.row, at.column);
      scratch_.taps.clear();
      for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + op.window[0], in_.height); ++y) {
        for (int64_t x = std::max<int64_t>(left, 0); x < std::min(left + op.window[1], in_.width);
             ++x) {
          scratch_.taps.push_back(place_.arena + in_.At(y, x));
        }
      }
      if (scratch_.taps.empty()) continue;
      kernels_.largest(scratch_.taps.data(), scratch_.taps.size(), out_.pitch, out);
    }
  }

  // Where the window of an output position begins.
  uint8_t* Window(int64_t row, int64_t column) const {
    const ProgramOperation& op = operation();
    return place_.arena + in_.At(row * op.strides[0] - op.padding[0][0],
                                 column * op.strides[1] - op.padding[1][0]);
  }

  void PointToRows(int64_t begin, int64_t count) {
    const std::vector<ProgramResidual>& residuals = operation().requantization.residuals;
    Walk at(out_.width, begin);
    for (int64_t i = 0; i < count; ++at.row, at.column = 0) {
      const int64_t columns = std::min(count - i, out_.width - at.column);
      kernels_.point_from(Window(at.row, at.column), operation().strides[1] * in_.pitch, columns,
                          &scratch_.windows[i]);
      if (is_wide()) {
        for (int64_t j = i; j < i + columns; ++j) {
          scratch_.wide_out[j] = place_.output + (begin + j) * out_.channels;
        }
      } else {
        kernels_.point_from(place_.arena + out_.At(at.row, at.column), out_.pitch, columns,
                            &scratch_.out[i]);
      }
      for (size_t j = 0; j < residuals.size(); ++j) {
        const ActivationLayout& layout = plan_.layouts[residuals[j].value];
        uint8_t* first = place_.arena + layout.At(at.row, at.column);
        kernels_.point_from(first, layout.pitch, columns,
                            &scratch_.residuals[j * kBlockPositions + i]);
      }
      i += columns;
    }
  }

  // -- Products ------------------------------------------------------------------------------------

  // Panels stay in the cache while the block's tiles meet them, except where each tile needs all
  // columns, or terms that are gathered for it.
  void Product(int64_t begin, int64_t count) {
    if (step_.product->takes_maximum && !step_.gathers) SumX(begin, count);
    const int64_t groups = operation().groups;
    if (operation().center) {
      ForTiles(count, [&](int64_t first, int rows) {
        for (int64_t g = 0; g < groups; ++g) GroupSums(g, first, rows, stride());
        Center(rows);
        Requantize(first, rows, 0, out_.channels, stride());
      });
      return;
    }
    for (int64_t g = 0; g < groups; ++g) {
      if (step_.gathers) {
        ForTiles(count, [&](int64_t first, int rows) {
          Gather(g, first, rows);
          for (int64_t p = 0; p < step_.panels; ++p) {
            RunTile(g, p, first, rows, scratch_.sums.data(), step_.panel_columns());
            RequantizePanel(g, p, first, rows);
          }
        });
        continue;
      }
      for (int64_t p = 0; p < step_.panels; ++p) Panel(g, p, count);
      for (int64_t i = 0; i < count; ++i) scratch_.windows[i] += step_.group_terms;
    }
  }

  // A panel of a group whose terms begin where the windows do.
  void Panel(int64_t g, int64_t p, int64_t count) {
    ProductTile tile = PanelTile(g, p);
    tile.sums_stride = step_.panel_columns();
    const int vectors = static_cast<int>(step_.panel_vectors(p));
    int64_t chunk = 0;
    ForTiles(count, [&](int64_t first, int rows) {
      tile.rows = scratch_.windows.data() + first;
      if (step_.product->takes_maximum) tile.less = scratch_.x_sums.data() + first;
      tile.sums = scratch_.sums.data() + (first - chunk) * tile.sums_stride;
      step_.product->run(rows, vectors, tile);
      const int64_t done = first + rows;
      if (done < count && done + kMostTileRows <= chunk + kChunkTiles * kMostTileRows) return;
      RequantizePanel(g, p, chunk, static_cast<int>(done - chunk));
      chunk = done;
    });
  }

  // Tiles of about one size.
  template <typename F>
  void ForTiles(int64_t count, F f) {
    const int64_t most = step_.product != nullptr ? step_.product->rows : kMostTileRows;
    const int64_t tiles = (count + most - 1) / most;
    const int64_t rows = count / tiles, longer = count % tiles;
    int64_t first = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t size = rows + (t < longer);
      f(first, static_cast<int>(size));
      first += size;
    }
  }

  // From row to row of sums of all columns.
  int64_t stride() const { return out_.channels + kColumnSlack; }

  // What all tiles of a panel have.
  ProductTile PanelTile(int64_t g, int64_t p) const {
    ProductTile tile = {};
    tile.runs = step_.runs.data();
    tile.num_runs = step_.runs.size();
    tile.panel = step_.weights.data() + (g * step_.panels + p) * step_.panel_bytes;
    tile.start = step_.starts.data() + g * step_.features + p * step_.panel_columns();
    return tile;
  }

  void RequantizePanel(int64_t g, int64_t p, int64_t first, int rows) {
    const int64_t width = step_.panel_columns(), column = p * width;
    Requantize(first, rows, g * step_.features + column,
               std::min(width, step_.features - column), width);
  }

  void GroupSums(int64_t g, int64_t first, int rows, int64_t stride) {
    if (step_.gathers) Gather(g, first, rows);
    for (int64_t p = 0; p < step_.panels; ++p) {
      const int64_t column = g * step_.features + p * step_.panel_columns();
      RunTile(g, p, first, rows, scratch_.sums.data() + column, stride);
    }
  }

  void RunTile(int64_t g, int64_t p, int64_t first, int rows, int32_t* sums, int64_t stride) {
    ProductTile tile = PanelTile(g, p);
    const uint8_t* windows[kMostTileRows];
    for (int r = 0; r < rows; ++r) {
      windows[r] = step_.gathers ? scratch_.gathered.data() + r * step_.gathered_bytes
                                 : scratch_.windows[first + r] + g * step_.group_terms;
    }
    tile.rows = windows;
    if (step_.product->takes_maximum) {
      tile.less = scratch_.x_sums.data() + (step_.gathers ? 0 : first);
    }
    tile.sums = sums;
    tile.sums_stride = stride;
    step_.product->run(rows, static_cast<int>(step_.panel_vectors(p)), tile);
  }

  // The terms of a group, one after another.
  void Gather(int64_t g, int64_t first, int rows) {
    const ProgramOperation& op = operation();
    const int64_t channels = in_.channels / op.groups;
    for (int r = 0; r < rows; ++r) {
      uint8_t* to = scratch_.gathered.data() + r * step_.gathered_bytes;
      const uint8_t* window = scratch_.windows[first + r] + g * channels;
      std::memset(to, 0, step_.gathered_bytes);
      for (int64_t i = 0; i < op.window[0]; ++i) {
        for (int64_t j = 0; j < op.window[1]; ++j, to += step_.group_terms) {
          std::memcpy(to, window + i * op.dilation[0] * in_.row_bytes +
                              j * op.dilation[1] * in_.pitch, channels);
        }
      }
      if (!step_.product->takes_maximum) continue;
      const uint8_t* row = scratch_.gathered.data() + r * step_.gathered_bytes;
      int32_t sum = 0;
      for (int64_t k = 0; k < step_.gathered_bytes; ++k) sum += row[k];
      scratch_.x_sums[r] = sum;
    }
  }

  // Σx over the windows of `count` positions. Each row's pixels are summed once, into a ring of as
  // many rows as a window spans and the one after, which is summed a row before its time: loads
  // that span several stores wait until these have left the store queue.
  void SumX(int64_t begin, int64_t count) {
    const ProgramOperation& op = operation();
    WindowSums sums;
    sums.rows = scratch_.window_rows.data();
    sums.num_rows = op.window[0];
    sums.stride = op.strides[1];
    sums.dilation = op.dilation[1];
    sums.taps = op.window[1];
    sums.out = scratch_.x_sums.data();
    for (Walk at(out_.width, begin); count > 0; ++at.row, at.column = 0) {
      const int64_t top = at.row * op.strides[0];  // in rows with the padding
      SumRows(top, top + step_.window_height);
      for (int64_t i = 0; i < op.window[0]; ++i) {
        scratch_.window_rows[i] =
            RowSums(top + i * op.dilation[0]) + at.column * op.strides[1];
      }
      sums.count = std::min(count, out_.width - at.column);
      kernels_.window_sums(sums);
      sums.out += sums.count;
      count -= sums.count;
      if (count == 0 && at.row + 1 < out_.height) SumRows(top + 1, top + step_.window_height + 1);
    }
  }

  void SumRows(int64_t begin, int64_t end) {
    for (next_row_ = std::max(next_row_, begin); next_row_ < end; ++next_row_) SumRow(next_row_);
  }

  int32_t* RowSums(int64_t row) const {
    return scratch_.row_sums.data() + (row & (step_.ring_rows - 1)) * step_.row_sums;
  }

  void SumRow(int64_t row) const {
    const ProgramOperation& op = operation();
    PixelSums sums;
    sums.first = place_.arena + in_.At(row - op.padding[0][0], -op.padding[1][0]);
    sums.pixels = (out_.width - 1) * op.strides[1] + (op.window[1] - 1) * op.dilation[1] + 1;
    sums.pitch = in_.pitch;
    sums.out = RowSums(row);
    kernels_.pixel_sums(sums);
  }

  // -- Other sums ----------------------------------------------------------------------------------

  void Sums(int64_t begin, int64_t count) {
    (void)begin;
    ForTiles(count, [&](int64_t first, int rows) {
      for (int r = 0; r < rows; ++r) {
        ChannelSums(scratch_.windows[first + r], scratch_.sums.data() + r * stride());
      }
      if (operation().center) Center(rows);
      Requantize(first, rows, 0, out_.channels, stride());
    });
  }

  // Of each channel alone.
  void ChannelSums(const uint8_t* window, int32_t* sums) const {
    const ProgramOperation& op = operation();
    const int64_t channels = out_.channels;
    const uint8_t* w = op.kernel.data();
    std::fill_n(sums, channels, 0);
    for (int64_t i = 0; i < op.window[0]; ++i) {
      for (int64_t j = 0; j < op.window[1]; ++j) {
        const uint8_t* x =
            window + i * op.dilation[0] * in_.row_bytes + j * op.dilation[1] * in_.pitch;
        if (op.kind == ProgramKind::kAdder) {
          for (int64_t c = 0; c < channels; ++c) {
            const int32_t d = x[c] - w[c];
            sums[c] += d < 0 ? -d : d;
          }
        } else if (op.kind == ProgramKind::kMultiply) {
          for (int64_t c = 0; c < channels; ++c) sums[c] += x[c] * static_cast<int8_t>(w[c]);
        } else {
          for (int64_t c = 0; c < channels; ++c) sums[c] += x[c];
          continue;
        }
        w += channels;
      }
    }
  }

  // F · S - Σ S, which fits int32 where its parts may not.
  void Center(int rows) {
    for (int r = 0; r < rows; ++r) {
      int32_t* sums = scratch_.sums.data() + r * stride();
      uint32_t total = 0;
      const uint32_t features = static_cast<uint32_t>(out_.channels);
      for (int64_t c = 0; c < out_.channels; ++c) total += static_cast<uint32_t>(sums[c]);
      for (int64_t c = 0; c < out_.channels; ++c) {
        sums[c] = static_cast<int32_t>(features * static_cast<uint32_t>(sums[c]) - total);
      }
    }
  }

  void Requantize(int64_t first, int rows, int64_t column, int64_t columns, int64_t stride) {
    const ProgramRequantization& each = operation().requantization;
    RequantizeTile tile;
    tile.rows = rows;
    tile.column = column;
    tile.used = tile.stored = columns;
    if (column + columns == out_.channels) tile.stored += out_.pitch - out_.channels;
    tile.sums = scratch_.sums.data();
    tile.sums_stride = stride;
    tile.multiplier = step_.multiplier.data() + column;
    tile.bias = step_.bias.data() + column;
    tile.narrow_bias = step_.narrow_bias.data() + column;
    tile.narrow = step_.narrow;
    tile.shift = static_cast<int>(step_.narrow ? std::min<int64_t>(each.shift, 31) : each.shift);
    tile.low = static_cast<int32_t>(each.low);
    tile.high = static_cast<int32_t>(each.high);
    tile.residuals = step_.residuals.data();
    tile.num_residuals = step_.residuals.size();
    tile.residual_rows = scratch_.residuals.data() + first;
    tile.residual_stride = kBlockPositions;
    tile.out = scratch_.out.data() + first;
    tile.wide_out = is_wide() ? scratch_.wide_out.data() + first : nullptr;
    kernels_.requantize(tile);
  }

  const ProgramPlan& plan_;
  const ProgramKernels& kernels_;
  const Step& step_;
  const ActivationLayout &in_, &out_;
  const Place& place_;
  Scratch& scratch_;
  int64_t next_row_ = 0;  // of the input, whose pixels are not summed yet
};

}  // namespace

void RunStep(const ProgramPlan& plan, const ProgramKernels& kernels, const Step& step,
             int64_t begin, int64_t end, const Place& place, Scratch& scratch) {
  StepRun(plan, kernels, step, place, scratch).Run(begin, end);
}

}  // namespace jadder
