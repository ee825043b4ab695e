// Random shapes through the products of bytes, against the literal sums, on several threads.
//
//   integers [seed] [cases] [threads]
//
// Meant to be built with -fsanitize=address,undefined, or with thread. Operands are exactly as
// large as they must be, so that a read beyond them is seen.

#include "integers.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "products.h"
#include "tasks.h"

namespace {

using namespace jadder;

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

  // Either of all values or of the two furthest apart, whose sums are the largest.
  template <typename T>
  std::vector<T> Values(int64_t size) {
    const bool extreme = To(3) == 0;
    std::vector<T> values(size);
    for (T& value : values) {
      const int64_t bits = extreme ? To(1) * 255 : To(255);
      value = static_cast<T>(std::is_signed_v<T> ? bits - 128 : bits);
    }
    return values;
  }
};

using Sums = std::vector<int32_t>;

// A result that nothing has been written to.
Sums Unset(size_t size) { return Sums(size, 0x55555555); }

void Check(const char* what, const Sums& actual, const Sums& expected) {
  for (size_t i = 0; i < actual.size(); ++i) {
    if (actual[i] != expected[i]) {
      std::printf("%s[%zu] is %d, not %d\n", what, i, actual[i], expected[i]);
      std::abort();
    }
  }
}

template <typename T>
void TryMatmul(const IntegerKernels& kernels, Pool& pool, Random& random) {
  MatmulShape s = {random.From(0, 3), random.From(0, 70), random.From(0, 40), random.From(0, 70),
                   1};
  if (random.To(7) == 0) s.depth = random.From(1000, 2600);
  if (random.To(30) == 0) s = {1, random.From(700, 900), random.From(60, 130), 40, 1};
  if (random.To(1)) s.w_batch = s.batch;
  if (s.w_batch == 0) s.w_batch = 1;
  const auto x = random.Values<T>(s.batch * s.rows * s.depth);
  const auto w = random.Values<T>(s.w_batch * s.depth * s.columns);
  Sums y(s.batch * s.rows * s.columns), out = Unset(y.size());
  for (int64_t b = 0; b < s.batch; ++b) {
    const T* matrix = w.data() + (s.w_batch == 1 ? 0 : b) * s.depth * s.columns;
    for (int64_t row = b * s.rows; row < (b + 1) * s.rows; ++row) {
      for (int64_t k = 0; k < s.depth; ++k) {
        for (int64_t n = 0; n < s.columns; ++n) {
          y[row * s.columns + n] -=
              std::abs(int{x[row * s.depth + k]} - int{matrix[k * s.columns + n]});
        }
      }
    }
  }
  IntegerMatmul(kernels, pool, s, x.data(), w.data(), out.data());
  Check("y", out, y);
}

// The source of output o through tap t, or -1 where it is a zero.
int64_t SourceAt(const ConvShape& s, int d, int64_t o, int64_t t) {
  const int64_t at = o * s.stride[d] + t * s.rhs_dilation[d] - s.low_padding[d];
  if (at < 0 || at % s.lhs_dilation[d] != 0) return -1;
  return at / s.lhs_dilation[d] < s.in[d] ? at / s.lhs_dilation[d] : -1;
}

ConvShape RandomConv(Random& random) {
  ConvShape s;
  s.batch = random.From(0, 4);
  s.groups = random.To(1) ? 1 : random.From(2, 4);
  int64_t c = random.From(0, 17), f = random.From(1, 20);
  if (random.To(2) == 0) {
    s.groups = random.From(1, 140);
    c = random.From(1, 3);
    f = random.From(1, 3);
  }
  if (random.To(5) == 0) f = random.From(30, 70);
  if (random.To(7) == 0) c = random.From(100, 300);
  if (c * f * s.groups > 20000) s.groups = 1;
  s.channels = c * s.groups;
  s.filters = f * s.groups;
  for (int d = 0; d < 2; ++d) {
    s.in[d] = random.To(20) == 0 ? 0 : random.From(1, 9);
    s.window[d] = random.To(20) == 0 ? 0 : random.From(1, 3);
    s.stride[d] = random.From(1, 3);
    s.low_padding[d] = random.From(-1, 3);
    s.lhs_dilation[d] = random.To(2) ? 1 : random.From(1, 3);
    s.rhs_dilation[d] = random.To(1) ? 1 : random.From(1, 3);
    const int64_t dilated = s.in[d] == 0 ? 0 : (s.in[d] - 1) * s.lhs_dilation[d] + 1;
    const int64_t reach = s.window[d] == 0 ? 0 : (s.window[d] - 1) * s.rhs_dilation[d] + 1;
    const int64_t room = dilated + s.low_padding[d] + random.From(-1, 3) - reach;
    s.out[d] = room < 0 ? 0 : room / s.stride[d] + 1;
  }
  return s;
}

template <typename T>
void TryConv(const IntegerKernels& kernels, Pool& pool, Random& random) {
  const ConvShape s = RandomConv(random);
  const int64_t c = s.channels / s.groups, f = s.filters / s.groups;
  const auto x = random.Values<T>(s.batch * s.in[0] * s.in[1] * s.channels);
  const auto w = random.Values<T>(s.window[0] * s.window[1] * c * s.filters);
  Sums y(s.batch * s.out[0] * s.out[1] * s.filters), out = Unset(y.size());
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < s.out[0]; ++i)
      for (int64_t j = 0; j < s.out[1]; ++j)
        for (int64_t p = 0; p < s.window[0]; ++p)
          for (int64_t q = 0; q < s.window[1]; ++q) {
            const int64_t row = SourceAt(s, 0, i, p), column = SourceAt(s, 1, j, q);
            const bool inside = row >= 0 && column >= 0;
            const int64_t from = ((b * s.in[0] + row) * s.in[1] + column) * s.channels;
            const int64_t to = ((b * s.out[0] + i) * s.out[1] + j) * s.filters;
            for (int64_t k = 0; k < c; ++k)
              for (int64_t n = 0; n < s.filters; ++n) {
                const int value = inside ? int{x[from + n / f * c + k]} : 0;
                y[to + n] -=
                    std::abs(value - int{w[((p * s.window[1] + q) * c + k) * s.filters + n]});
              }
          }
  IntegerConv(kernels, pool, s, x.data(), w.data(), out.data());
  Check("conv y", out, y);
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned seed = count > 1 ? std::atoi(arguments[1]) : 0;
  const int cases = count > 2 ? std::atoi(arguments[2]) : 200;
  const int threads = count > 3 ? std::atoi(arguments[3]) : 4;
  const IntegerKernels& kernels = SelectIntegerKernels();
  Threads pool(threads);
  // Callers at the same time, more than the pool has threads.
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      Random random{std::mt19937(seed * 1000 + caller)};
      for (int i = 0; i < cases; ++i) {
        TryMatmul<uint8_t>(kernels, pool, random);
        TryMatmul<int8_t>(kernels, pool, random);
        TryConv<uint8_t>(kernels, pool, random);
        TryConv<int8_t>(kernels, pool, random);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("%s: %d cases agree\n", SelectKernels().name, 3 * cases);
}
