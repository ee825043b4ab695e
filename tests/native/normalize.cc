// Random shapes through batch normalisation and its gradient, against the literal formulas in double
// precision, on several threads and on one, whose results have the same bits.
//
//   normalize [seed] [cases] [threads]
//
// Meant to be built with -fsanitize=address,undefined, or with thread. Operands are exactly as
// large as they must be, so that a read beyond them is seen; some hold NaN or infinity.

#include "normalize.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "driver.h"

namespace {

using namespace jadder;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// A pool of no other thread.
class OneThread final : public Pool {
 public:
  int64_t threads() const override { return 1; }
  void Schedule(std::function<void()>) override { std::abort(); }
};

struct Arrays {
  Floats x, scale, bias, residual, g, g_mean, g_var;
};

struct Results {
  Floats y, mean, var, dx, dscale, dbias;

  explicit Results(const Normalization& s)
      : y(s.rows * s.features, 1e30f), mean(s.features, 1e30f), var(mean), dx(y), dscale(mean),
        dbias(mean) {}
  std::vector<const Floats*> All() const { return {&y, &mean, &var, &dx, &dscale, &dbias}; }
};

Floats RandomFloats(Random& random, int64_t size, float center, float spread) {
  std::normal_distribution<float> normal(center, spread);
  Floats values(size);
  for (float& value : values) value = normal(random.engine);
  return values;
}

Results Run(Pool& pool, const Normalization& s, const Arrays& a) {
  Results r(s);
  const NormalizeKernels& kernels = SelectNormalizeKernels();
  Normalize(kernels, pool, s, a.x.data(), a.scale.data(), a.bias.data(),
            a.residual.empty() ? nullptr : a.residual.data(), r.y.data(), r.mean.data(),
            r.var.data());
  NormalizeGradient(kernels, pool, s, a.x.data(), a.scale.data(), a.bias.data(), r.mean.data(),
                    r.var.data(), a.g.data(), a.g_mean.data(), a.g_var.data(), r.dx.data(),
                    r.dscale.data(), r.dbias.data());
  return r;
}

void TakeRowMeans(const Normalization& s, Doubles& values) {
  for (int64_t r = 0; r < s.rows; ++r) {
    double sum = 0;
    for (int64_t f = 0; f < s.features; ++f) sum += values[r * s.features + f];
    for (int64_t f = 0; f < s.features; ++f) values[r * s.features + f] -= sum / s.features;
  }
}

// The formulas; where the affine part is near zero, g counts as the results' own arithmetic decides.
struct Expected {
  Doubles y, mean, var, dx, dscale, dbias;
  std::vector<bool> is_near_zero;  // of features: whether any value is

  Expected(const Normalization& s, const Arrays& a)
      : y(a.x.size()), mean(s.features), var(mean), dx(y), dscale(mean), dbias(mean),
        is_near_zero(s.features) {
    Doubles x(a.x.begin(), a.x.end());
    if (s.center) TakeRowMeans(s, x);
    for (int64_t f = 0; f < s.features; ++f) {
      double total = 0, squares = 0, sum = 0, along = 0;
      for (int64_t r = 0; r < s.rows; ++r) total += x[r * s.features + f];
      mean[f] = total / s.rows;
      for (int64_t r = 0; r < s.rows; ++r) {
        const double d = x[r * s.features + f] - mean[f];
        squares += d * d;
      }
      var[f] = squares / s.rows;
      const double inverse = 1 / std::sqrt(var[f] + s.epsilon);
      Doubles g(s.rows);
      for (int64_t r = 0; r < s.rows; ++r) {
        const int64_t i = r * s.features + f;
        const double standard = (x[i] - mean[f]) * inverse;
        const double affine = standard * a.scale[f] + a.bias[f];
        const double value = a.residual.empty() ? affine : affine + a.residual[i];
        y[i] = s.rectify && value < 0 ? 0 : value;
        is_near_zero[f] = is_near_zero[f] || std::fabs(affine) < 1e-2;
        g[r] = s.rectify && !(affine > 0) ? 0 : a.g[i];
        sum += g[r];
        along += g[r] * standard;
      }
      dbias[f] = sum;
      dscale[f] = along;
      const double factor = a.scale[f] * inverse;
      for (int64_t r = 0; r < s.rows; ++r) {
        const double standard = (x[r * s.features + f] - mean[f]) * inverse;
        dx[r * s.features + f] =
            factor * g[r] + (a.g_mean[f] - factor * sum) / s.rows +
            standard * (2 * a.g_var[f] / inverse - factor * along) / s.rows;
      }
    }
    if (s.center) TakeRowMeans(s, dx);
  }
};

[[noreturn]] void Fail(const char* what, const Normalization& s, double actual, double expected) {
  std::printf("%s of %lld x %lld%s%s: %g, not %g\n", what, static_cast<long long>(s.rows),
              static_cast<long long>(s.features), s.center ? ", centered" : "",
              s.rectify ? ", rectified" : "", actual, expected);
  std::fflush(stdout);
  std::abort();
}

void Check(const char* what, const Normalization& s, const Floats& actual, const Doubles& expected,
           double tolerance, const std::function<bool(int64_t)>& counts) {
  double size = 1;
  for (const double value : expected) {
    if (std::isfinite(value)) size = std::fmax(size, std::fabs(value));
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!counts(i % s.features)) continue;
    const bool same = std::isfinite(expected[i])
                          ? std::fabs(actual[i] - expected[i]) <= tolerance * size
                          : !std::isfinite(actual[i]);
    if (!same) Fail(what, s, actual[i], expected[i]);
  }
}

void Try(Pool& pool, Random& random) {
  const int64_t features = random.Once(4) ? random.From(1, 300) : random.From(1, 40);
  const int64_t rows = random.Once(3) ? random.From(1, 30000 / features) : random.From(1, 80);
  const Normalization s{rows, features, 1e-2f, features > 1 && random.Once(2), random.Once(2)};
  const bool far = random.Once(3);
  Arrays a;
  a.x = RandomFloats(random, rows * features, far ? -2600 : 1, far ? 4 : 2);
  a.scale = RandomFloats(random, features, 1, 0.3f);
  a.bias = RandomFloats(random, features, 0, 1);
  if (random.Once(2)) a.residual = RandomFloats(random, rows * features, 0, 1);
  a.g = RandomFloats(random, rows * features, 0, 1);
  a.g_mean = RandomFloats(random, features, 0, 1);
  a.g_var = RandomFloats(random, features, 0, 1);
  const float bad[] = {NAN, INFINITY, -INFINITY};
  if (random.Once(4)) a.x[random.To(rows * features - 1)] = bad[random.To(2)];

  const Results found = Run(pool, s, a);
  OneThread one;
  const Results alone = Run(one, s, a);
  for (size_t i = 0; i < found.All().size(); ++i) {
    const Floats &some = *found.All()[i], &other = *alone.All()[i];
    if (std::memcmp(some.data(), other.data(), some.size() * sizeof(float)) != 0) {
      Fail("bits of one thread", s, 0, 0);
    }
  }
  const Expected right(s, a);
  const auto every = [](int64_t) { return true; };
  // A row's gradient has a part of every feature's, where it is centered.
  const bool some_near = std::any_of(right.is_near_zero.begin(), right.is_near_zero.end(),
                                     [](bool near) { return near; });
  const auto decided = [&](int64_t f) { return !s.rectify || !right.is_near_zero[f]; };
  const auto all_decided = [&](int64_t f) { return decided(f) && !(s.center && s.rectify && some_near); };
  const double tolerance = far ? 5e-3 : 1e-4;  // the spread of few values may be small
  Check("y", s, found.y, right.y, tolerance, every);
  Check("mean", s, found.mean, right.mean, tolerance, every);
  Check("var", s, found.var, right.var, tolerance, every);
  Check("dbias", s, found.dbias, right.dbias, tolerance, decided);
  Check("dscale", s, found.dscale, right.dscale, tolerance, decided);
  Check("dx", s, found.dx, right.dx, tolerance, all_decided);
}

}  // namespace

int main(int count, char** arguments) {
  return jadder::Drive(count, arguments, Try, jadder::SelectNormalizeKernels().name);
}
