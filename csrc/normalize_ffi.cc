// The foreign calls of batch normalisation.
//
// A call comes from any program: all that is relied on is checked before memory is touched.

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "normalize.h"
#include "xla/ffi/api/ffi.h"
#include "xla_calls.h"

namespace jadder {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsResult = ffi::Result<Floats>;
using Dimensions = ffi::AnyBuffer::Dimensions;

// An array's name and shape, for those that must be like another.
struct Named {
  const char* name;
  Dimensions shape;
};

Normalization ShapeOf(Dimensions x, float epsilon, bool center, bool rectify) {
  if (x.size() == 0) Refuse("x has no features: its shape is ()");
  if (!(epsilon >= 0)) Refuse("epsilon must not be negative");
  Normalization shape{1, x.back(), epsilon, center, rectify};
  for (size_t d = 0; d + 1 < x.size(); ++d) {
    if (__builtin_mul_overflow(shape.rows, x[d], &shape.rows)) Refuse("too many rows: " + Text(x));
  }
  return shape;
}

void RequireShape(Dimensions expected, std::initializer_list<Named> arrays) {
  for (const Named& array : arrays) {
    if (!std::equal(array.shape.begin(), array.shape.end(), expected.begin(), expected.end())) {
      Refuse(std::string(array.name) + " has shape " + Text(array.shape) + ", not " +
             Text(expected));
    }
  }
}

void RequireFeatures(int64_t features, std::initializer_list<Named> arrays) {
  for (const Named& array : arrays) {
    if (array.shape.size() != 1 || array.shape[0] != features) {
      Refuse(std::string(array.name) + " has shape " + Text(array.shape) + ", not (" +
             std::to_string(features) + ")");
    }
  }
}

// With a residual, which is added, as one more operand.
ffi::Error StandardizeImpl(ffi::ThreadPool threads, Floats x, Floats scale, Floats bias,
                           ffi::RemainingArgs others, FloatsResult y, FloatsResult mean,
                           FloatsResult var, float epsilon, bool center, bool rectify) {
  return Try([&] {
    const Normalization shape = ShapeOf(x.dimensions(), epsilon, center, rectify);
    RequireFeatures(shape.features, {{"scale", scale.dimensions()},
                                     {"bias", bias.dimensions()},
                                     {"mean", mean->dimensions()},
                                     {"var", var->dimensions()}});
    RequireShape(x.dimensions(), {{"y", y->dimensions()}});
    const float* residual = nullptr;
    if (others.size() > 1) Refuse("there are more operands than x, scale, bias and a residual");
    if (others.size() == 1) {
      const ffi::ErrorOr<Floats> given = others.get<Floats>(0);
      if (!given.has_value()) Refuse("the residual is not of float32");
      RequireShape(x.dimensions(), {{"the residual", given->dimensions()}});
      residual = given->typed_data();
    }
    XlaPool pool(threads);
    Normalize(SelectNormalizeKernels(), pool, shape, x.typed_data(), scale.typed_data(),
              bias.typed_data(), residual, y->typed_data(), mean->typed_data(),
              var->typed_data());
  });
}

ffi::Error StandardizeGradientImpl(ffi::ThreadPool threads, Floats x, Floats scale, Floats bias,
                                   Floats mean, Floats var, Floats g, Floats g_mean, Floats g_var,
                                   FloatsResult dx, FloatsResult dscale, FloatsResult dbias,
                                   float epsilon, bool center, bool rectify) {
  return Try([&] {
    const Normalization shape = ShapeOf(x.dimensions(), epsilon, center, rectify);
    RequireFeatures(shape.features, {{"scale", scale.dimensions()},
                                     {"bias", bias.dimensions()},
                                     {"mean", mean.dimensions()},
                                     {"var", var.dimensions()},
                                     {"g_mean", g_mean.dimensions()},
                                     {"g_var", g_var.dimensions()},
                                     {"dscale", dscale->dimensions()},
                                     {"dbias", dbias->dimensions()}});
    RequireShape(x.dimensions(), {{"g", g.dimensions()}, {"dx", dx->dimensions()}});
    XlaPool pool(threads);
    NormalizeGradient(SelectNormalizeKernels(), pool, shape, x.typed_data(), scale.typed_data(),
                      bias.typed_data(), mean.typed_data(), var.typed_data(), g.typed_data(),
                      g_mean.typed_data(), g_var.typed_data(), dx->typed_data(),
                      dscale->typed_data(), dbias->typed_data());
  });
}

template <typename Binding>
auto WithAttributes(Binding binding) {
  return std::move(binding)
      .template Attr<float>("epsilon")
      .template Attr<bool>("center")
      .template Attr<bool>("rectify");
}

auto Bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>();
}

}  // namespace
}  // namespace jadder

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadder_standardize, jadder::StandardizeImpl,
    jadder::WithAttributes(jadder::Bind()
                               .RemainingArgs()
                               .Ret<jadder::Floats>()
                               .Ret<jadder::Floats>()
                               .Ret<jadder::Floats>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadder_standardize_gradient, jadder::StandardizeGradientImpl,
    jadder::WithAttributes(jadder::Bind()
                               .Arg<jadder::Floats>()
                               .Arg<jadder::Floats>()
                               .Arg<jadder::Floats>()
                               .Arg<jadder::Floats>()
                               .Arg<jadder::Floats>()
                               .Ret<jadder::Floats>()
                               .Ret<jadder::Floats>()
                               .Ret<jadder::Floats>()));

#pragma GCC visibility pop
