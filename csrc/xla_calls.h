// What foreign calls have in common: XLA's threads as a Pool's, and errors.

#pragma once

#include <algorithm>
#include <exception>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
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

// Ends a call, inside Try, with an error for whoever made it.
[[noreturn]] inline void Refuse(const std::string& why) {
  throw std::invalid_argument("jadder: " + why);
}

template <typename Shape>
std::string Text(const Shape& shape) {
  std::string text;
  for (const int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "(" + text + ")";
}

// Calls f, whose exceptions become XLA's errors.
template <typename F>
xla::ffi::Error Try(F f) {
  using xla::ffi::Error;
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return Error::InvalidArgument(error.what());
  } catch (const std::bad_alloc&) {
    return Error(xla::ffi::ErrorCode::kResourceExhausted, "jadder: out of memory");
  } catch (const std::exception& error) {
    return Error::Internal(error.what());
  }
  return Error::Success();
}

}  // namespace jadder
