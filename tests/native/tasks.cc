// Tasks and pools that throw, and pools that start helpers late, against what ParallelFor promises.
//
//   tasks [seed] [cases] [threads]
//
// Meant to be built with -fsanitize=address,undefined, or with thread: what a helper shares lives in
// the frame of the call, so that a call that ends too early is seen.

#include "tasks.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "driver.h"

namespace {

using namespace jadder;

// Schedules so many, and then throws.
class FailingPool final : public Pool {
 public:
  FailingPool(Pool& pool, int64_t before, int64_t threads)
      : pool_(pool), left_(before), threads_(threads) {}
  int64_t threads() const override { return threads_; }
  void Schedule(std::function<void()> work) override {
    if (left_-- == 0) throw std::runtime_error("no more threads");
    pool_.Schedule(std::move(work));
    std::this_thread::sleep_for(std::chrono::microseconds(100));  // for the helper to begin
  }

 private:
  Pool& pool_;
  int64_t left_;
  const int64_t threads_;
};

void Require(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::abort();
}

void Wait(Random& random) {
  std::this_thread::sleep_for(std::chrono::microseconds(random.To(200)));
}

// Each task is done once and before the call ends, though the pool gives out.
void TryFailingPool(Pool& pool, Random& random) {
  const int64_t threads = random.From(1, 9), count = random.To(20);
  FailingPool failing(pool, random.To(threads), threads);
  const auto done = std::make_unique<std::vector<std::atomic<int>>>(count);
  const int64_t nap = random.To(200);
  ParallelFor(failing, count, [&](int64_t i) {
    std::this_thread::sleep_for(std::chrono::microseconds(nap));
    ++(*done)[i];
  });
  for (const std::atomic<int>& each : *done) Require(each == 1, "a task was not done once");
}

// What a task throws comes out of the call, on whatever thread it was, when no other task runs.
void TryFailingTask(Pool& pool, Random& random) {
  const int64_t count = random.From(1, 20), bad = random.To(count - 1);
  const bool memory = random.To(1);
  const auto running = std::make_unique<std::atomic<int>>(0);
  const int64_t nap = random.To(200);
  bool thrown = false;
  try {
    ParallelFor(pool, count, [&](int64_t i) {
      ++*running;
      std::this_thread::sleep_for(std::chrono::microseconds(nap));
      --*running;
      if (i == bad && memory) throw std::bad_alloc();
      if (i == bad) throw std::length_error("too long");
    });
  } catch (const std::bad_alloc&) {
    thrown = memory;
  } catch (const std::length_error& error) {
    thrown = !memory && std::string(error.what()) == "too long";
  }
  Require(thrown, "what a task threw was lost");
  Require(*running == 0, "a task ran on after the call");
}

}  // namespace

int main(int count, char** arguments) {
  return Drive(count, arguments, [](Pool& pool, Random& random) {
    TryFailingPool(pool, random);
    TryFailingTask(pool, random);
    Wait(random);
  });
}
