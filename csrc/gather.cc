#include "gather.h"

#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "types.h"

namespace jadder {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A value as the tiles read it.
template <typename E, typename T>
E As(T value) {
  if constexpr (std::is_same_v<E, uint8_t>) {
    return ToByte(value);
  } else {
    return ToFloat(value);
  }
}

template <typename T, typename E>
void Convert(const T* from, int64_t size, E* to) {
  if constexpr (std::is_same_v<T, E>) {
    std::copy_n(from, size, to);
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = As<E>(from[i]);
  }
}

template <typename T, typename E>
void FillZeros(E* to, int64_t size) {
  std::fill_n(to, size, As<E>(T{}));
}

// The terms of one pixel.
template <typename T, typename E>
void CopyPixel(const Gather& gather, const T* pixel, int64_t group, E* to) {
  if (gather.width == 1) return Convert(pixel + group * gather.terms, gather.terms, to);
  const int64_t lane = group * gather.lanes, lanes = gather.used_lanes(group);
  for (int64_t term = 0; term < gather.terms; ++term, to += gather.width) {
    if (gather.shared == 1 && gather.terms == 1) {
      Convert(pixel + lane, lanes, to);
    } else {
      const int64_t shared = gather.shared, terms = gather.terms;
      const T* from = pixel + lane / shared * terms + term;
      for (int64_t i = 0, rest = shared - lane % shared; i < lanes; ++i) {
        to[i] = As<E>(*from);
        if (--rest == 0) {
          rest = shared;
          from += terms;
        }
      }
    }
    std::fill(to + lanes, to + gather.width, E{});
  }
}

// Copies `count` pixels of a row, from `first` on in steps of `grain`, zeros outside and between.
template <typename T, typename E>
void CopyRow(const Gather& gather, const T* image, int64_t row, int64_t first, int64_t grain,
             int64_t count, int64_t group, E* to) {
  const int64_t size = gather.terms * gather.width, dilation = gather.dilation[1];
  if (row < 0 || row >= gather.dilated(0) || row % gather.dilation[0] != 0 ||
      gather.source[1] == 0) {
    FillZeros<T>(to, count * size);
    return;
  }
  const T* from = image + row / gather.dilation[0] * gather.source[1] * gather.source_channels;
  const int64_t before = first < 0 ? std::min(count, CeilDiv(-first, grain)) : 0;
  const int64_t start = first + before * grain;
  const int64_t left = std::max<int64_t>(0, CeilDiv(gather.dilated(1) - start, grain));
  const int64_t inside = std::min(count - before, left);
  FillZeros<T>(to, before * size);
  to += before * size;
  if (grain == 1 && dilation == 1 && gather.groups == 1 && gather.width == 1) {
    Convert(from + start * gather.source_channels, inside * size, to);
  } else {
    for (int64_t p = 0; p < inside; ++p) {
      const int64_t column = start + p * grain;
      if (column % dilation == 0) {
        CopyPixel(gather, from + column / dilation * gather.source_channels, group, to + p * size);
      } else {
        FillZeros<T>(to + p * size, size);
      }
    }
  }
  FillZeros<T>(to + inside * size, (count - before - inside) * size);
}

// Copies what targets [column, column + columns) in rows [row, row + rows) of an image meet.
template <typename T, typename E>
void CopySources(const Gather& gather, const Window& window, int64_t group, const T* image,
                 int64_t row, int64_t rows, int64_t column, int64_t columns, E* to) {
  const Stretches &down = window.copied_rows, &across = window.copied_columns;
  for (const Stretches::Stretch& lines : down.stretches) {
    const int64_t count = down.Count(lines, rows), first = lines.first + row * down.step;
    E* line = to + lines.place * window.row_stride;
    for (int64_t r = 0; r < count; ++r, line += window.row_stride) {
      for (const Stretches::Stretch& pixels : across.stretches) {
        CopyRow(gather, image, first + r * down.grain, pixels.first + column * across.step,
                across.grain, across.Count(pixels, columns), group,
                line + pixels.place * window.pixel_stride);
      }
    }
  }
}

}  // namespace

Gather::Gather(int64_t batch, int64_t groups, const int64_t (&source)[2],
               const int64_t (&target)[2], int64_t source_channels, int64_t target_channels)
    : batch(batch),
      groups(groups),
      source{source[0], source[1]},
      target{target[0], target[1]},
      source_channels(source_channels),
      target_channels(target_channels),
      terms(source_channels / groups),
      lanes(target_channels / groups) {}

Gather Gather::Lanewise(int64_t vector) const {
  Gather gather = *this;
  gather.groups = CeilDiv(target_channels, vector);
  gather.lanes = gather.width = vector;
  gather.shared = lanes;
  return gather;
}

Window::Window(const Gather& gather, const Phase& rows, const Phase& columns, bool in_place)
    : rows(&rows), columns(&columns) {
  direct = in_place && gather.width == 1 && gather.dilation[0] == 1 && gather.dilation[1] == 1 &&
           rows.Inside(gather.source[0]) && columns.Inside(gather.source[1]);
}

void Window::Layout(const Gather& gather, int64_t row_targets, int64_t column_targets) {
  if (direct) {
    copied_rows = Stretches::InPlace(*rows);
    copied_columns = Stretches::InPlace(*columns);
    pixel_stride = gather.source_channels;
    row_stride = pixel_stride * gather.source[1];
  } else {
    copied_rows = Stretches(*rows, row_targets);
    copied_columns = Stretches(*columns, column_targets);
    pixel_stride = gather.terms * gather.width;
    row_stride = CheckedProduct(pixel_stride, copied_columns.size);
  }
}

std::vector<Run> Window::Runs(const Gather& gather) const {
  std::vector<Run> runs;
  for (size_t row = 0; row < rows->taps.size(); ++row) {
    for (size_t column = 0; column < columns->taps.size(); ++column) {
      const int64_t offset = Offset(row, column);
      if (!runs.empty() && runs.back().offset + runs.back().length * gather.width == offset) {
        runs.back().length += gather.terms;
      } else {
        runs.push_back({offset, gather.terms});
      }
    }
  }
  return runs;
}

Cut::Cut(const Gather& gather, int64_t panels, int64_t tile, int64_t wanted, int64_t most,
         int64_t copied, Window& window)
    : panels(panels) {
  const int64_t down = window.rows->count, across = window.columns->count;
  const int64_t pixel = gather.terms * gather.width;
  const int64_t row = CheckedProduct(pixel, Stretches(*window.rows, 1).size);
  columns = std::min(across, most);
  while (columns > tile &&
         CheckedProduct(Stretches(*window.columns, columns).size, row) > copied) {
    columns = CeilDiv(columns, 2);
  }
  rows = std::max<int64_t>(1, most / columns);
  const int64_t column = CheckedProduct(Stretches(*window.columns, columns).size, pixel);
  const auto size = [&] {
    const int64_t of_image = Stretches(*window.rows, std::min(rows, down)).size;
    return CheckedProduct(CheckedProduct(of_image, CeilDiv(rows, down)), column);
  };
  while (rows > 1 && size() > copied) rows = CeilDiv(rows, 2);
  window.Layout(gather, std::min(rows, down), columns);
  row_tasks = CeilDiv(gather.batch * down, rows);
  column_tasks = CeilDiv(across, columns);
  this->panels = CeilDiv(panels, std::min(panels, CeilDiv(wanted, blocks())));
  panel_tasks = CeilDiv(panels, this->panels);
}

template <typename E>
void PixelsOf<E>::Reserve(int64_t size) {
  if (static_cast<int64_t>(row.size()) >= size) return;
  row.resize(size);
  offset.resize(size);
  target_offset.resize(size);
}

template <typename T, typename E>
void GatherPixels(const Gather& gather, const Window& window, int64_t group, int64_t row,
                  int64_t rows, int64_t column, int64_t columns, const T* source,
                  PixelsOf<E>& pixels) {
  const Phase &down = *window.rows, &across = *window.columns;
  const int64_t channels = gather.target_channels;
  const Stretches &copied_rows = window.copied_rows, &copied_columns = window.copied_columns;
  const int64_t row_step = down.step / copied_rows.grain * window.row_stride;
  const int64_t column_step = across.step / copied_columns.grain * window.pixel_stride;
  const int64_t image_size = CheckedProduct(copied_rows.size, window.row_stride);
  E* copy = nullptr;
  if (!window.direct) {
    const int64_t images = (row + rows - 1) / down.count - row / down.count + 1;
    copy = ThreadBuffer<Gather, E>(CheckedProduct(images, image_size) + 7);
  }
  pixels.Reserve(rows * columns);
  pixels.count = 0;
  while (rows > 0) {
    const int64_t image = row / down.count, j = row % down.count;
    const int64_t here = std::min(rows, down.count - j);
    const T* from = source + image * gather.source[0] * gather.source[1] * gather.source_channels;
    const E* base = copy;
    if (!window.direct) {
      CopySources(gather, window, group, from, j, here, column, columns, copy);
      copy += image_size;
    } else if constexpr (std::is_same_v<T, E>) {
      base = from + (down.first_source() + j * down.step) * window.row_stride +
             (across.first_source() + column * across.step) * window.pixel_stride +
             group * gather.terms;
    }
    for (int64_t r = 0; r < here; ++r) {
      const int64_t y = down.residue + (j + r) * down.period;
      const int64_t x = across.residue + column * across.period;
      const int64_t first = ((image * gather.target[0] + y) * gather.target[1] + x) * channels +
                            group * gather.lanes;
      const E** starts = pixels.row.data() + pixels.count;
      int64_t* offsets = pixels.offset.data() + pixels.count;
      for (int64_t c = 0; c < columns; ++c) {
        starts[c] = base + r * row_step + c * column_step;
        offsets[c] = first + c * across.period * channels;
      }
      pixels.count += columns;
    }
    row += here;
    rows -= here;
  }
}

template struct PixelsOf<float>;
template struct PixelsOf<uint8_t>;
template void GatherPixels(const Gather&, const Window&, int64_t, int64_t, int64_t, int64_t,
                           int64_t, const float*, Pixels&);
template void GatherPixels(const Gather&, const Window&, int64_t, int64_t, int64_t, int64_t,
                           int64_t, const bfloat16*, Pixels&);
template void GatherPixels(const Gather&, const Window&, int64_t, int64_t, int64_t, int64_t,
                           int64_t, const uint8_t*, PixelsOf<uint8_t>&);
template void GatherPixels(const Gather&, const Window&, int64_t, int64_t, int64_t, int64_t,
                           int64_t, const int8_t*, PixelsOf<uint8_t>&);

}  // namespace jadder
