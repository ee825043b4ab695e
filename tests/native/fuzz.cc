// Random shapes through every product of floats, against the literal sums, on several threads.
//
//   fuzz [seed] [cases] [threads]
//
// Meant to be built with -fsanitize=address,undefined, or with thread. Operands are exactly as
// large as they must be, so that a read beyond them is seen; some hold NaN or infinity.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "driver.h"
#include "types.h"

namespace {

using namespace jadder;

using Doubles = std::vector<double>;

// An operand as the products take it, and its values.
template <typename T>
struct Operand {
  std::vector<T> given;
  Doubles value;

  Operand(Random& random, int64_t size, bool spoil) : given(size), value(size) {
    std::normal_distribution<float> normal;
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int64_t i = 0; i < size; ++i) Set(i, normal(random.engine));
    for (int64_t i = random.To(2); spoil && size > 0 && i > 0; --i) {
      Set(random.To(size - 1), bad[random.To(2)]);
    }
  }

 private:
  void Set(int64_t i, float number) {
    if constexpr (std::is_same_v<T, float>) {
      given[i] = number;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof(bits));
      given[i] = {static_cast<uint16_t>(bits >> 16)};
    }
    value[i] = ToFloat(given[i]);
  }
};

struct Psi {
  double scale, bound;
  double operator()(double d) const {
    if (std::isnan(d)) return d;
    if (std::isinf(scale)) return bound * ((d > 0) - (d < 0));
    return std::fmin(std::fmax(scale * d, -bound), bound);
  }
};

Psi BoundedPsi(Random& random) {
  return random.To(2) ? Psi{1.0 + random.To(3), 1.0} : Psi{INFINITY, 2.0};
}

// The full-precision rule sums x and w apart, or multiplies zeros of padding with their difference,
// and is not held to infinities.
Psi AnyPsi(Random& random, bool spoil) {
  return spoil || random.To(1) ? BoundedPsi(random) : Psi{0.5, INFINITY};
}

struct Results {
  Doubles y, squares, dx, dw;
};

// Poison for the products to write over: what they leave out is not zero by luck.
std::vector<float> Unset(size_t size) { return std::vector<float>(size, 1e30f); }

void Check(const char* what, const std::vector<float>& actual, const Doubles& expected,
           double tolerance, double absolute = 0) {
  double largest = 1;
  for (const double value : expected) {
    if (std::isfinite(value)) largest = std::fmax(largest, std::fabs(value));
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = actual[i], b = expected[i];
    const bool same = std::isnan(b) ? std::isnan(a)
                                    : a == b || std::fabs(a - b) <= tolerance * largest + absolute;
    if (!same) {
      std::printf("%s[%zu] of %zu is %g, not %g\n", what, i, actual.size(), a, b);
      std::fflush(stdout);
      std::abort();
    }
  }
}

// The largest magnitude of values and zero, or infinity where one is not finite.
double Largest(const Doubles& values) {
  double largest = 0;
  for (const double value : values) {
    if (!std::isfinite(value)) return INFINITY;
    largest = std::fmax(largest, std::fabs(value));
  }
  return largest;
}

// The most that rounding to 16-bit integers takes from sums of so many terms.
double MaxRounding(int64_t terms, const Doubles& x) {
  const double step = 2 * Largest(x) / 2046;
  return std::isfinite(step) ? static_cast<double>(terms) * step : 0;
}
double SquareRounding(int64_t terms, const Doubles& x, const Doubles& w) {
  const double largest = std::fmax(Largest(x), Largest(w)), step = 2 * largest / 4094;
  return std::isfinite(step) ? static_cast<double>(terms) * step * (4 * largest + step) : 0;
}
double DxRounding(int64_t terms, const Psi& psi, const Doubles& x, const Doubles& w,
                  const Doubles& g) {
  if (std::isinf(psi.bound)) {
    const double rounding = Largest(g) * (Largest(w) / 4095 + (Largest(w) + Largest(x)) / 8191);
    return static_cast<double>(terms) * psi.scale * rounding;
  }
  const double limit = psi.bound / psi.scale, largest = Largest(g);
  const double step = (Largest(x) + limit) / 3900;
  if (std::isinf(psi.scale) || !std::isfinite(step) || !std::isfinite(largest)) return 0;
  const double rounding = step * largest + limit * largest / 8191;
  return static_cast<double>(terms) * psi.scale * rounding;
}

double OuterRounding(int64_t terms, const Psi& psi, const Doubles& x, const Doubles& g) {
  if (!std::isinf(psi.bound)) return 0;
  const double largest = Largest(x) * Largest(g);
  return static_cast<double>(terms) * psi.scale * largest * (0.5 / 2047 + 0.5 / 4095 + 1e-6);
}

MatmulShape RandomMatmul(Random& random) {
  MatmulShape s = {random.From(0, 3), random.From(0, 70), random.From(0, 40), random.From(0, 70),
                   1};
  if (random.Once(8)) {  // sums of several passes
    s.rows = random.From(0, 20);
    s.columns = random.From(1, 20);
    (random.To(1) ? s.depth : s.columns) = random.From(250, 1100);
  }
  if (random.To(1) && s.batch > 0) s.w_batch = s.batch;
  return s;
}

template <typename T>
Results LiteralMatmul(const MatmulShape& s, const Psi& psi, const Psi& psi_w, const Operand<T>& x,
                      const Operand<T>& w, const Operand<T>& g) {
  Results to = {Doubles(g.value.size()), Doubles(g.value.size()), Doubles(x.value.size()),
                Doubles(s.batch * s.depth * s.columns)};
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t m = 0; m < s.rows; ++m) {
      for (int64_t k = 0; k < s.depth; ++k) {
        for (int64_t n = 0; n < s.columns; ++n) {
          const int64_t row = b * s.rows + m, i = row * s.depth + k, o = row * s.columns + n;
          const int64_t matrix = s.w_batch == 1 ? 0 : b;
          const double d = x.value[i] - w.value[(matrix * s.depth + k) * s.columns + n];
          to.y[o] -= std::fabs(d);
          to.squares[o] -= d * d;
          to.dx[i] += psi(-d) * g.value[o];
          to.dw[(b * s.depth + k) * s.columns + n] += psi_w(d) * g.value[o];
        }
      }
    }
  }
  return to;
}

template <typename T>
void TryMatmul(const Kernels& kernels, Pool& pool, Random& random) {
  const MatmulShape s = RandomMatmul(random);
  const bool spoil = random.Once(4);
  const Psi psi = AnyPsi(random, spoil), psi_w = AnyPsi(random, spoil);
  const Operand<T> x(random, s.batch * s.rows * s.depth, spoil);
  const Operand<T> w(random, s.w_batch * s.depth * s.columns, spoil);
  const Operand<T> g(random, s.batch * s.rows * s.columns, spoil);
  const Results expected = LiteralMatmul(s, psi, psi_w, x, w, g);
  const T *x_data = x.given.data(), *w_data = w.given.data(), *g_data = g.given.data();

  std::vector<float> out = Unset(expected.y.size());
  Matmul<T>(kernels, pool, s, Product::kAbs, x_data, w_data, out.data());
  Check("y", out, expected.y, 1e-5);
  out = Unset(expected.y.size());
  Matmul<T>(kernels, pool, s, Product::kMax, x_data, w_data, out.data());
  Check("fast y", out, expected.y, 1e-5);
  out = Unset(expected.y.size());
  Matmul<T>(kernels, pool, s, Product::kPairMax, x_data, w_data, out.data());
  Check("int16 y", out, expected.y, 1e-5,
        MaxRounding(s.depth, x.value));
  out = Unset(expected.y.size());
  Matmul<T>(kernels, pool, s, Product::kSquare, x_data, w_data, out.data());
  Check("squares", out, expected.squares, 1e-5);
  out = Unset(expected.y.size());
  Matmul<T>(kernels, pool, s, Product::kPairSquare, x_data, w_data, out.data());
  Check("int16 squares", out, expected.squares, 1e-5, SquareRounding(s.depth, x.value, w.value));
  out = Unset(expected.dx.size());
  const Form form = Form::Gradient(psi.scale, psi.bound);
  MatmulDx<T>(kernels, pool, s, form, false, x_data, w_data, g_data, out.data());
  Check("dx", out, expected.dx, 1e-4);
  out = Unset(expected.dx.size());
  MatmulDx<T>(kernels, pool, s, form, true, x_data, w_data, g_data, out.data());
  Check("int16 dx", out, expected.dx, 1e-4,
        DxRounding(s.columns, psi, x.value, w.value, g.value));
  out = Unset(expected.dw.size());
  MatmulDw<T>(kernels, pool, s, psi_w.scale, psi_w.bound, false, x_data, w_data, g_data,
              out.data());
  Check("dw", out, expected.dw, 1e-4);
  out = Unset(expected.dw.size());
  MatmulDw<T>(kernels, pool, s, psi_w.scale, psi_w.bound, true, x_data, w_data, g_data, out.data());
  Check("int16 dw", out, expected.dw, 1e-4, OuterRounding(s.rows, psi_w, x.value, g.value));
}

ConvShape RandomConv(Random& random) {
  ConvShape s;
  s.batch = random.From(0, 4);
  s.groups = random.From(1, 4);
  int64_t c = random.From(1, 6), f = random.From(1, 20), most = 9;
  switch (random.To(9)) {
    case 0:
    case 1:  // groups narrower than a vector
      s.groups = random.From(1, 40);
      c = random.From(1, 2);
      f = random.From(1, 2);
      break;
    case 2:  // several panels
      f = random.From(30, 70);
      break;
    case 3:  // sums of several passes
      s.batch = s.groups = 1;
      c = random.From(40, 80);
      break;
    case 4:  // images of several tasks
      s.batch = random.From(1, 2);
      s.groups = 1;
      most = 60;
      break;
  }
  if (random.Once(40)) (random.To(1) ? c : f) = 0;
  s.channels = c * s.groups;
  s.filters = f * s.groups;
  SetSpatial(random, most, s);
  return s;
}

template <typename T>
Results LiteralConv(const ConvShape& s, const Psi& psi, const Psi& psi_w, const Operand<T>& x,
                    const Operand<T>& w, const Operand<T>& g) {
  const int64_t c = s.channels / s.groups, f = s.filters / s.groups;
  Results sums = {Doubles(g.value.size()), Doubles(g.value.size()), Doubles(x.value.size()),
                  Doubles(w.value.size())};
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < s.out[0]; ++i)
      for (int64_t j = 0; j < s.out[1]; ++j)
        for (int64_t p = 0; p < s.window[0]; ++p)
          for (int64_t q = 0; q < s.window[1]; ++q) {
            const int64_t row = SourceAt(s, 0, i, p), column = SourceAt(s, 1, j, q);
            const bool inside = row >= 0 && column >= 0;
            for (int64_t n = 0; n < s.filters; ++n)
              for (int64_t k = 0; k < c; ++k) {
                const int64_t from =
                    ((b * s.in[0] + row) * s.in[1] + column) * s.channels + n / f * c + k;
                const int64_t at = ((p * s.window[1] + q) * c + k) * s.filters + n;
                const int64_t to = ((b * s.out[0] + i) * s.out[1] + j) * s.filters + n;
                const double d = (inside ? x.value[from] : 0.0) - w.value[at];
                sums.y[to] -= std::fabs(d);
                sums.squares[to] -= d * d;
                if (inside) sums.dx[from] += psi(-d) * g.value[to];
                sums.dw[at] += psi_w(d) * g.value[to];
              }
          }
  return sums;
}

template <typename T>
void TryConv(const Kernels& kernels, Pool& pool, Random& random) {
  const ConvShape s = RandomConv(random);
  const bool spoil = random.Once(4);
  const Psi psi = AnyPsi(random, spoil), psi_w = AnyPsi(random, spoil);
  const Operand<T> x(random, s.batch * s.in[0] * s.in[1] * s.channels, spoil);
  const Operand<T> w(random, s.window[0] * s.window[1] * s.channels / s.groups * s.filters, spoil);
  const Operand<T> g(random, s.batch * s.out[0] * s.out[1] * s.filters, spoil);
  const Results expected = LiteralConv(s, psi, psi_w, x, w, g);
  const T *x_data = x.given.data(), *w_data = w.given.data(), *g_data = g.given.data();

  std::vector<float> out = Unset(expected.y.size());
  Conv<T>(kernels, pool, s, Product::kAbs, x_data, w_data, out.data());
  Check("conv y", out, expected.y, 1e-5);
  out = Unset(expected.y.size());
  Conv<T>(kernels, pool, s, Product::kMax, x_data, w_data, out.data());
  Check("fast conv y", out, expected.y, 1e-5);
  const int64_t taps = s.window[0] * s.window[1];
  out = Unset(expected.y.size());
  Conv<T>(kernels, pool, s, Product::kPairMax, x_data, w_data, out.data());
  Check("int16 conv y", out, expected.y, 1e-5,
        MaxRounding(taps * s.channels / s.groups, x.value));
  out = Unset(expected.y.size());
  Conv<T>(kernels, pool, s, Product::kSquare, x_data, w_data, out.data());
  Check("conv squares", out, expected.squares, 1e-5);
  out = Unset(expected.y.size());
  Conv<T>(kernels, pool, s, Product::kPairSquare, x_data, w_data, out.data());
  Check("int16 conv squares", out, expected.squares, 1e-5,
        SquareRounding(taps * s.channels / s.groups, x.value, w.value));
  out = Unset(expected.dx.size());
  const Form form = Form::Gradient(psi.scale, psi.bound);
  ConvDx<T>(kernels, pool, s, form, false, x_data, w_data, g_data, out.data());
  Check("conv dx", out, expected.dx, 1e-4);
  out = Unset(expected.dx.size());
  ConvDx<T>(kernels, pool, s, form, true, x_data, w_data, g_data, out.data());
  Check("int16 conv dx", out, expected.dx,
        1e-4, DxRounding(taps * s.filters / s.groups, psi, x.value, w.value, g.value));
  out = Unset(expected.dw.size());
  ConvDw<T>(kernels, pool, s, psi_w.scale, psi_w.bound, false, x_data, w_data, g_data, out.data());
  Check("conv dw", out, expected.dw, 1e-4);
  out = Unset(expected.dw.size());
  ConvDw<T>(kernels, pool, s, psi_w.scale, psi_w.bound, true, x_data, w_data, g_data, out.data());
  const int64_t positions = s.batch * s.out[0] * s.out[1];
  Check("int16 conv dw", out, expected.dw, 1e-4,
        OuterRounding(positions, psi_w, x.value, g.value));
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels& kernels = SelectKernels();
  return Drive(count, arguments, [&kernels](Pool& pool, Random& random) {
    TryMatmul<float>(kernels, pool, random);
    TryMatmul<bfloat16>(kernels, pool, random);
    TryConv<float>(kernels, pool, random);
    TryConv<bfloat16>(kernels, pool, random);
  });
}
