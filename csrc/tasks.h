// Sharing out work over a thread pool that others use too.

#pragma once

#include <cstdint>
#include <functional>

namespace jadder {

// What is asked of a pool: XLA's through the FFI, or a test's own.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t threads() const = 0;
  virtual void Schedule(std::function<void()> work) = 0;
};

// Calls task(i) for each 0 <= i < count, on this thread and on those of the pool that are free.
//
// This thread works too and waits only for tasks that another has begun, so a pool whose threads
// are all busy, or all waiting here, delays nothing; nor does a pool that throws, which has fewer
// helpers. Throws the first of what tasks threw, and then some tasks have not run; never while one
// of them still does.
void ParallelFor(Pool& pool, int64_t count, const std::function<void(int64_t)>& task);

}  // namespace jadder
