// XLA's threads, as those of a Pool.

#pragma once

#include <algorithm>
#include <functional>
#include <utility>

#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace jadder {

class XlaPool final : public Pool {
 public:
  explicit XlaPool(xla::ffi::ThreadPool pool) : pool_(pool) {}
  int64_t threads() const override { return std::max<int64_t>(1, pool_.num_threads()); }
  void Schedule(std::function<void()> work) override { pool_.Schedule(std::move(work)); }

 private:
  xla::ffi::ThreadPool pool_;
};

}  // namespace jadder
