// Networks of integers (jadder.integer.program), run image by image.
//
// A thread takes an image through the whole network, or where there are fewer images than threads,
// all share the positions of each operation. Activations lie in one arena whose places are reused
// as soon as nothing needs them; each has a border of its zero point as wide as the operations that
// read it want padding, so that windows need not know of it.

#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "program_format.h"
#include "program_kernels.h"
#include "program_plan.h"
#include "tasks.h"

namespace jadder {

class Program {
 public:
  // Throws ProgramError, or std::bad_alloc.
  Program(ProgramSpec spec, const ProgramKernels& kernels);
  ~Program();
  Program(const Program&) = delete;

  const ProgramValue& input() const { return spec_.values.front(); }
  const ProgramValue& output() const { return spec_.values.back(); }

  // The int32 outputs of images of bytes, both one after another. Threads may call it together.
  void Run(Pool& pool, const uint8_t* images, int64_t batch, int32_t* outputs) const;

 private:
  struct Workspace;

  void RunTogether(Pool& pool, const uint8_t* image, int32_t* output) const;

  std::unique_ptr<Workspace> Acquire() const;
  void Release(std::unique_ptr<Workspace> workspace) const;

  const ProgramSpec spec_;
  const ProgramKernels& kernels_;
  const ProgramPlan plan_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;  // as many as threads ran at once
};

}  // namespace jadder
