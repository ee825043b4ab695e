// Reading the pixels that a window meets, as rows of a matrix that overlap in memory.
//
// A task copies the few source rows that its targets read, padding included, into memory of its own
// that the cache holds; where no padding is read, it uses them in place. There the channels of
// neighbouring taps are one stretch, and every tap is the same distance from its target.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "window.h"

namespace jadder {

// Sources are read value by value, and targets have the lanes of the result. Lane-wise, a group is
// one vector of target channels, and a term of a source is the vector of channels that they meet.
struct Gather {
  int64_t batch, groups;
  int64_t source[2], target[2];
  int64_t source_channels, target_channels;  // of all groups
  int64_t terms, lanes;                      // of a source pixel and a target pixel, in a group
  int64_t dilation[2] = {1, 1};              // zeros between sources that phases count as sources
  int64_t width = 1;                         // values of a term
  int64_t shared = 1;                        // lane-wise: target channels that meet the same sources

  Gather() = default;
  Gather(int64_t batch, int64_t groups, const int64_t (&source)[2], const int64_t (&target)[2],
         int64_t source_channels, int64_t target_channels);

  // The same gather by vectors of `lanes` channels.
  Gather Lanewise(int64_t lanes) const;

  int64_t dilated(int d) const { return source[d] == 0 ? 0 : (source[d] - 1) * dilation[d] + 1; }
  int64_t used_lanes(int64_t group) const {
    return lanes < target_channels - group * lanes ? lanes : target_channels - group * lanes;
  }
};

// The sources of one combination of phases, and their layout in values: a copy of some stretches of
// rows and columns, or the source itself.
struct Window {
  const Phase* rows = nullptr;
  const Phase* columns = nullptr;
  bool direct = false;
  Stretches copied_rows, copied_columns;
  int64_t row_stride = 0, pixel_stride = 0;

  Window() = default;
  // Reads sources in place where it can, if that is allowed. Layout() follows.
  Window(const Gather& gather, const Phase& rows, const Phase& columns, bool in_place);

  // Fixes the places of taps for copies that serve so many rows of an image, and columns.
  void Layout(const Gather& gather, int64_t row_targets, int64_t column_targets);

  // Of tap number `row` of the rows' phase and `column` of the columns'.
  int64_t Offset(size_t row, size_t column) const {
    return copied_rows.places[row] * row_stride + copied_columns.places[column] * pixel_stride;
  }
  // The terms of all taps, as stretches from where a target's sources begin.
  std::vector<Run> Runs(const Gather& gather) const;
};

// How the targets of a window are cut into tasks, of so many rows, columns and panels.
struct Cut {
  int64_t rows = 1, columns = 1, panels = 1;
  int64_t row_tasks = 0, column_tasks = 0, panel_tasks = 0;

  Cut() = default;
  // Wants so many tasks, of at most `most` targets, whose copies have at most `copied` values where
  // a tile allows. Lays the window out for them.
  Cut(const Gather& gather, int64_t panels, int64_t tile, int64_t wanted, int64_t most,
      int64_t copied, Window& window);

  int64_t blocks() const { return row_tasks * column_tasks; }
  int64_t tasks() const { return blocks() * panel_tasks; }
};

// The targets of one task: where the sources of each begin, and its first lane in the result.
// Sources are floats, or bytes as ToByte makes them.
template <typename E>
struct PixelsOf {
  std::vector<const E*> row;
  std::vector<int64_t> offset, target_offset;
  int64_t count = 0;

  void Reserve(int64_t size);
};
using Pixels = PixelsOf<float>;

// Finds the sources of targets [column, column + columns) in rows [row, row + rows), which count
// through the images. The copy lasts until this thread's next call, and seven values behind it may
// be read.
template <typename T, typename E>
void GatherPixels(const Gather& gather, const Window& window, int64_t group, int64_t row,
                  int64_t rows, int64_t column, int64_t columns, const T* source,
                  PixelsOf<E>& pixels);

}  // namespace jadder
