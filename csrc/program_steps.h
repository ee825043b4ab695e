// What one thread does of a step: some of its positions.

#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "program_kernels.h"
#include "program_plan.h"

namespace jadder {

// A thread's working memory beside the arena.
struct Scratch {
  Buffer<int32_t> sums, row_sums, x_sums;
  Buffer<uint8_t> gathered;
  std::vector<uint8_t*> windows, residuals, out;
  std::vector<int32_t*> wide_out;
  std::vector<const int32_t*> window_rows;
  std::vector<const uint8_t*> taps;

  explicit Scratch(const ScratchSizes& sizes);
};

// What a step reads and writes.
struct Place {
  uint8_t* arena;
  const uint8_t* image;  // (height, width, channels)
  int32_t* output;
};

// Computes positions [begin, end) of the step's output, and the border around them.
void RunStep(const ProgramPlan& plan, const ProgramKernels& kernels, const Step& step,
             int64_t begin, int64_t end, const Place& place, Scratch& scratch);

}  // namespace jadder
