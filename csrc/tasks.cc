#include "tasks.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace jadder {
namespace {

// Denormals and rounding as in the calling thread: XLA flushes denormals while it runs a program.
class FloatMode {
 public:
#if defined(__SSE2__)
  static unsigned Current() { return _mm_getcsr(); }
  explicit FloatMode(unsigned mode) : saved_(_mm_getcsr()) { _mm_setcsr(mode); }
  ~FloatMode() { _mm_setcsr(saved_); }
#else
  static unsigned Current() { return 0; }
  explicit FloatMode(unsigned) : saved_(0) {}
#endif

 private:
  unsigned saved_;
};

// Outlives the call: a pool may start a helper when all work is long done, and it then finds the
// counter used up and touches nothing else.
struct Shared {
  int64_t count;
  const std::function<void(int64_t)>* task;
  unsigned float_mode;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> helpers{0};  // that may be inside a task
  std::exception_ptr error;  // the first
  std::mutex mutex;
  std::condition_variable idle;

  void Work() {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      try {
        (*task)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (error == nullptr) error = std::current_exception();
        next = count;
      }
    }
  }

  void Help() {
    helpers.fetch_add(1);
    if (next.load() < count) {
      FloatMode mode(float_mode);
      Work();
    }
    if (helpers.fetch_sub(1) == 1) {
      std::lock_guard<std::mutex> lock(mutex);
      idle.notify_all();
    }
  }

  void WaitForHelpers() {
    for (int spin = 0; spin < 2000; ++spin) {
      if (helpers.load() == 0) return;
#if defined(__SSE2__)
      _mm_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex);
    idle.wait(lock, [this] { return helpers.load() == 0; });
  }
};

}  // namespace

void ParallelFor(Pool& pool, int64_t count, const std::function<void(int64_t)>& task) {
  const int64_t helpers = std::min(count, pool.threads()) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto shared = std::make_shared<Shared>();
  shared->count = count;
  shared->task = &task;
  shared->float_mode = FloatMode::Current();
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Help(); });
  } catch (...) {  // those that began already share `task`: go on, and wait for them
  }
  shared->Work();
  shared->WaitForHelpers();
  if (shared->error != nullptr) std::rethrow_exception(std::exchange(shared->error, nullptr));
}

}  // namespace jadder
