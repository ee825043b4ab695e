#include "program.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <utility>

#include "program_steps.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace jadder {
namespace {

constexpr int64_t kSmallTask = 1 << 17;  // terms not worth sharing
constexpr int64_t kTasksPerThread = 3;   // so that a slow thread delays little
constexpr int kSpins = 4000;

// The steps of one image among threads. Whoever comes takes what is left of the current step, then
// waits until all of it is done; whoever comes late finds nothing to do.
class Team {
 public:
  Team(const std::vector<Step>& steps, int64_t threads) : progress_(steps.size()) {
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      const double terms = static_cast<double>(step.positions) * static_cast<double>(step.terms);
      const double tasks = std::min<double>(kTasksPerThread * threads, terms / kSmallTask);
      int64_t size = static_cast<int64_t>(step.positions / std::max(tasks, 1.0));
      size = (std::max<int64_t>(size, 1) + kMostTileRows - 1) / kMostTileRows * kMostTileRows;
      progress_[i].size = size;
      progress_[i].positions = step.positions;
    }
  }

  // run(step, begin, end) for what this thread gets.
  template <typename F>
  void Work(F run) {
    for (size_t i = 0; i < progress_.size(); ++i) {
      Progress& each = progress_[i];
      if (each.done.load(std::memory_order_acquire) == each.positions) continue;
      for (;;) {
        const int64_t begin = each.next.fetch_add(each.size, std::memory_order_relaxed);
        if (begin >= each.positions) break;
        const int64_t end = std::min(each.positions, begin + each.size);
        run(i, begin, end);
        Finish(each, end - begin);
      }
      Await(each);
    }
  }

 private:
  struct alignas(64) Progress {
    std::atomic<int64_t> next{0}, done{0};
    int64_t size = 0, positions = 0;
  };

  void Finish(Progress& each, int64_t count) {
    if (each.done.fetch_add(count) + count < each.positions) return;
    if (waiting_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    finished_.notify_all();
  }

  void Await(Progress& each) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (each.done.load(std::memory_order_acquire) == each.positions) return;
#if defined(__SSE2__)
      _mm_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_.fetch_add(1);
    finished_.wait(lock, [&] { return each.done.load() == each.positions; });
    waiting_.fetch_sub(1);
  }

  std::vector<Progress> progress_;
  std::atomic<int> waiting_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

}  // namespace

struct Program::Workspace {
  Buffer<uint8_t> arena;
  Scratch scratch;

  explicit Workspace(const ProgramPlan& plan) : scratch(plan.scratch) {}
};

Program::Program(ProgramSpec spec, const ProgramKernels& kernels)
    : spec_(std::move(spec)), kernels_(kernels), plan_(MakePlan(spec_, kernels)) {}

Program::~Program() = default;

void Program::Run(Pool& pool, const uint8_t* images, int64_t batch, int32_t* outputs) const {
  const int64_t threads = std::max<int64_t>(1, pool.threads());
  const int64_t alone = batch / threads * threads;
  std::atomic<int64_t> next{0};
  ParallelFor(pool, std::min(threads, alone), [&](int64_t) {
    auto workspace = Acquire();
    workspace->arena.Resize(plan_.arena_bytes);
    for (int64_t i; (i = next.fetch_add(1)) < alone;) {
      const Place place = {workspace->arena.data(), images + i * input().size(),
                           outputs + i * output().size()};
      for (const Step& step : plan_.steps) {
        RunStep(plan_, kernels_, step, 0, step.positions, place, workspace->scratch);
      }
    }
    Release(std::move(workspace));
  });
  for (int64_t i = alone; i < batch; ++i) {
    RunTogether(pool, images + i * input().size(), outputs + i * output().size());
  }
}

void Program::RunTogether(Pool& pool, const uint8_t* image, int32_t* output) const {
  auto own = Acquire();
  own->arena.Resize(plan_.arena_bytes);
  const Place place = {own->arena.data(), image, output};
  Team team(plan_.steps, pool.threads());
  ParallelFor(pool, pool.threads(), [&](int64_t) {
    auto workspace = Acquire();
    team.Work([&](size_t step, int64_t begin, int64_t end) {
      RunStep(plan_, kernels_, plan_.steps[step], begin, end, place, workspace->scratch);
    });
    Release(std::move(workspace));
  });
  Release(std::move(own));
}

std::unique_ptr<Program::Workspace> Program::Acquire() const {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      auto workspace = std::move(idle_.back());
      idle_.pop_back();
      return workspace;
    }
  }
  return std::make_unique<Workspace>(plan_);
}

void Program::Release(std::unique_ptr<Workspace> workspace) const {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(workspace));
}

}  // namespace jadder
