// Random shapes through the products of bytes, against the literal sums, on several threads.
//
//   integers [seed] [cases] [threads]
//
// Meant to be built with -fsanitize=address,undefined, or with thread. Operands are exactly as
// large as they must be, so that a read beyond them is seen.

#include "integers.h"

#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "driver.h"

namespace {

using namespace jadder;

// Either of all values or of the two furthest apart, whose sums are the largest.
template <typename T>
std::vector<T> Values(Random& random, int64_t size) {
  const bool extreme = random.Once(4);
  std::vector<T> values(size);
  for (T& value : values) {
    const int64_t bits = extreme ? random.To(1) * 255 : random.To(255);
    value = static_cast<T>(std::is_signed_v<T> ? bits - 128 : bits);
  }
  return values;
}

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
  const auto x = Values<T>(random, s.batch * s.rows * s.depth);
  const auto w = Values<T>(random, s.w_batch * s.depth * s.columns);
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
  SetSpatial(random, 9, s);
  return s;
}

template <typename T>
void TryConv(const IntegerKernels& kernels, Pool& pool, Random& random) {
  const ConvShape s = RandomConv(random);
  const int64_t c = s.channels / s.groups, f = s.filters / s.groups;
  const auto x = Values<T>(random, s.batch * s.in[0] * s.in[1] * s.channels);
  const auto w = Values<T>(random, s.window[0] * s.window[1] * c * s.filters);
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
  const IntegerKernels& kernels = SelectIntegerKernels();
  return Drive(count, arguments, [&kernels](Pool& pool, Random& random) {
    TryMatmul<uint8_t>(kernels, pool, random);
    TryMatmul<int8_t>(kernels, pool, random);
    TryConv<uint8_t>(kernels, pool, random);
    TryConv<int8_t>(kernels, pool, random);
  });
}
