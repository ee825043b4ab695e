// What the drivers share: a pool of threads, random numbers and shapes, and the callers.

#pragma once

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "products.h"

namespace jadder {

class Threads final : public Pool {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { Loop(); });
  }
  ~Threads() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t threads() const override { return static_cast<int64_t>(threads_.size()); }
  void Schedule(std::function<void()> work) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(work));
    }
    ready_.notify_one();
  }

 private:
  void Loop() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return stop_ || !queue_.empty(); });
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

struct Random {
  std::mt19937 engine;
  int64_t To(int64_t most) { return std::uniform_int_distribution<int64_t>(0, most)(engine); }
  int64_t From(int64_t least, int64_t most) { return least + To(most - least); }
  bool Once(int64_t in) { return To(in - 1) == 0; }
};

// Fills in the spatial sizes: images of up to `most` pixels a side, windows of up to 3, now and
// then none, or taps that lie far apart.
inline void SetSpatial(Random& random, int64_t most, ConvShape& s) {
  for (int d = 0; d < 2; ++d) {
    s.in[d] = random.Once(40) ? 0 : random.From(1, most);
    s.window[d] = random.Once(40) ? 0 : random.From(1, 3);
    s.stride[d] = random.From(1, 3);
    s.low_padding[d] = random.From(-1, 3);
    s.lhs_dilation[d] = random.To(2) ? 1 : random.From(1, 3);
    s.rhs_dilation[d] = random.To(1) ? 1 : random.From(1, 3);
    if (random.Once(8)) {
      s.rhs_dilation[d] = random.From(3, 2 * most);
      s.low_padding[d] = random.From(0, s.rhs_dilation[d]);
    }
    const int64_t dilated = s.in[d] == 0 ? 0 : (s.in[d] - 1) * s.lhs_dilation[d] + 1;
    const int64_t reach = s.window[d] == 0 ? 0 : (s.window[d] - 1) * s.rhs_dilation[d] + 1;
    int64_t room = dilated + s.low_padding[d] + random.From(-1, 3) - reach;
    if (random.Once(8)) room = random.To(most);  // which ends in as much padding as that takes
    s.out[d] = room < 0 ? 0 : room / s.stride[d] + 1;
  }
}

// The source of output o through tap t, or -1 where it is a zero.
inline int64_t SourceAt(const ConvShape& s, int d, int64_t o, int64_t t) {
  const int64_t at = o * s.stride[d] + t * s.rhs_dilation[d] - s.low_padding[d];
  if (at < 0 || at % s.lhs_dilation[d] != 0) return -1;
  return at / s.lhs_dilation[d] < s.in[d] ? at / s.lhs_dilation[d] : -1;
}

// Tries cases from three callers at the same time, on one pool, as `[seed] [cases] [threads]` say.
inline int Drive(int count, char** arguments,
                 const std::function<void(Pool& pool, Random& random)>& attempt,
                 const char* instruction_set = SelectKernels().name) {
  const unsigned seed = count > 1 ? std::atoi(arguments[1]) : 0;
  const int cases = count > 2 ? std::atoi(arguments[2]) : 200;
  const int threads = count > 3 ? std::atoi(arguments[3]) : 4;
  constexpr int kCallers = 3;
  {
    Threads pool(threads);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
      callers.emplace_back([&, caller] {
        Random random{std::mt19937(seed * 1000 + caller)};
        for (int i = 0; i < cases; ++i) attempt(pool, random);
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
  std::printf("%s: %d cases agree\n", instruction_set, kCallers * cases);
  return 0;
}

}  // namespace jadder
