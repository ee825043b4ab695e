// How an integer program is run: where its activations lie, and its operations with their weights
// as the tiles want them.

#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "program_format.h"
#include "program_kernels.h"

namespace jadder {

// An activation in the arena: pixels of `pitch` bytes, zeros after their channels, in rows with a
// border of the zero point.
struct ActivationLayout {
  int64_t height, width, channels;
  int64_t border[2][2] = {};  // rows above and below, pixels left and right
  int64_t pitch = 0, row_bytes = 0;
  int64_t offset = 0, bytes = 0;    // in the arena
  int64_t origin = 0;               // of the first pixel, from the arena's begin
  std::vector<uint8_t> border_row;  // a row of the border, if there is one

  int64_t At(int64_t row, int64_t column) const {
    return origin + row * row_bytes + column * pitch;
  }
};

struct Step {
  const ProgramOperation* operation = nullptr;  // null where the image is copied into the arena
  int64_t input = 0, output = 0;                // values
  int64_t positions = 0;                        // of the output
  int64_t terms = 1;                            // in all sums of a position

  // Of a product. A depthwise one has no panels: each channel meets its own weights.
  const ProgramProduct* product = nullptr;
  bool depthwise = false;
  bool gathers = false;  // the terms of each group first, since they are not whole groups in x
  int64_t group_terms = 0;
  std::vector<Run> runs;
  Buffer<uint8_t> weights;
  int64_t features = 0;         // of one of the operation's groups
  int64_t panels = 0;           // of one of them
  int64_t panel_bytes = 0;      // of a full one
  std::vector<int32_t> starts;  // of each column
  int64_t gathered_bytes = 0;   // of a row
  int64_t window_height = 0;    // rows from a window's first to its last, and one
  int64_t row_sums = 0;         // room for the sums of a row's pixels
  int64_t ring_rows = 0;        // rows of them that are kept, a power of two

  // Of a requantization.
  std::vector<int32_t> multiplier, narrow_bias;
  std::vector<int64_t> bias;
  std::vector<TileResidual> residuals;
  bool narrow = false;

  int64_t panel_vectors(int64_t panel) const {
    const int64_t all = (features + product->columns - 1) / product->columns;
    return all - panel * product->vectors < product->vectors ? all - panel * product->vectors
                                                             : product->vectors;
  }
  int64_t panel_columns() const { return int64_t{product->vectors} * product->columns; }
};

// What a thread needs beside the arena, in elements.
struct ScratchSizes {
  int64_t sums = 0, gathered = 0, residuals = 0;
  int64_t row_sums = 0, window_rows = 0;  // sums of pixels, and the rows of a window
};

// Positions that are prepared together, and those whose sums become bytes together.
inline constexpr int64_t kBlockPositions = 8 * kMostTileRows;
inline constexpr int64_t kChunkTiles = 4;

struct ProgramPlan {
  std::vector<ActivationLayout> layouts;  // of each value
  std::vector<Step> steps;                // one for each value
  int64_t arena_bytes = 0;
  ScratchSizes scratch;
};

// The plan points into `spec`. Throws ProgramError where the arena would be too large.
ProgramPlan MakePlan(const ProgramSpec& spec, const ProgramKernels& kernels);

}  // namespace jadder
