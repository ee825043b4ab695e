// The functions that XLA calls.
//
// Dimensions before those of the product itself come from vmap: each operand has them all, of the
// mapped size or of size 1, and the result of the mapped size.
//
// A call comes from any program, not only from jadder's own: all that a product relies on is checked
// here, in time that does not depend on the sizes, before memory is touched. What does not hold is
// thrown as std::invalid_argument and returned to XLA as an error.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "integers.h"
#include "products.h"
#include "types.h"
#include "xla/ffi/api/ffi.h"
#include "xla_calls.h"

namespace jadder {
namespace {

namespace ffi = xla::ffi;
using Sizes = ffi::Span<const int64_t>;
using FloatResult = ffi::Result<ffi::Buffer<ffi::F32>>;
using IntegerResult = ffi::Result<ffi::Buffer<ffi::S32>>;

// So that no arithmetic on positions comes near 2^63. jadder.kernels.limits says the same.
constexpr int64_t kMostFactor = (int64_t{1} << 31) - 1;   // of a stride, a dilation, a padding
constexpr int64_t kMostPosition = int64_t{1} << 56;       // in an image with its zeros
constexpr int64_t kMostByteTerms = kMostFactor / 255;     // whose sum an int32 holds

using Shape = std::vector<int64_t>;

void RequireShape(const char* name, const Shape& actual, const Shape& implied) {
  if (actual != implied) {
    Refuse(std::string(name) + " has shape " + Text(actual) + " where the operands imply " +
           Text(implied));
  }
}

int64_t SizeOf(const Shape& shape) {
  int64_t product = 1;
  for (const int64_t n : shape) {
    if (__builtin_mul_overflow(product, n, &product)) Refuse("too many elements: " + Text(shape));
  }
  return product;
}

// An operand or result of `rank` dimensions, and those that vmap put before them.
struct Mapped {
  Shape outer, inner;
  int64_t size;  // of the inner dimensions

  Mapped(const char* name, ffi::AnyBuffer::Dimensions dimensions, size_t rank) {
    const Shape whole(dimensions.begin(), dimensions.end());
    if (whole.size() < rank || std::any_of(whole.begin(), whole.end(), [](int64_t n) { return n < 0; })) {
      Refuse(std::string(name) + " has shape " + Text(whole) + ", not one of " +
             std::to_string(rank) + " dimensions or more");
    }
    outer.assign(whole.begin(), whole.end() - rank);
    inner.assign(whole.end() - rank, whole.end());
    size = SizeOf(inner);
    SizeOf(whole);
  }
};

// The positions of the operands, in elements, for each result in turn.
class Mapping {
 public:
  Mapping(std::vector<Mapped> operands, const Mapped& result)
      : operands_(std::move(operands)), outer_(operands_[0].outer) {
    for (const Mapped& operand : operands_) {
      if (operand.outer.size() != outer_.size()) RefuseOuter(operand);
      for (size_t d = 0; d < outer_.size(); ++d) {
        if (outer_[d] == 1) outer_[d] = operand.outer[d];
      }
    }
    for (const Mapped& operand : operands_) {
      for (size_t d = 0; d < outer_.size(); ++d) {
        if (operand.outer[d] != 1 && operand.outer[d] != outer_[d]) RefuseOuter(operand);
      }
    }
    if (result.outer != outer_) RefuseOuter(result);
  }

  int64_t Count() const { return SizeOf(outer_); }

  // Whether all results share the second operand, and none another.
  bool OnlyKernelIsShared() const {
    for (size_t i = 0; i < operands_.size(); ++i) {
      if (i == 1 ? SizeOf(operands_[i].outer) != 1 : operands_[i].outer != outer_) return false;
    }
    return true;
  }

  // Where operand `which` begins for result `index`.
  int64_t Offset(size_t which, int64_t index) const {
    const Mapped& operand = operands_[which];
    int64_t offset = 0, stride = operand.size;
    for (size_t d = outer_.size(); d-- > 0;) {
      if (operand.outer[d] != 1) offset += index % outer_[d] * stride;
      stride *= operand.outer[d];
      index /= outer_[d];
    }
    return offset;
  }

 private:
  [[noreturn]] void RefuseOuter(const Mapped& array) const {
    Refuse("mapped dimensions " + Text(array.outer) + " do not go with " + Text(outer_));
  }

  std::vector<Mapped> operands_;
  Shape outer_;
};

template <typename T>
inline constexpr ffi::DataType kDataType = ffi::F32;
template <>
inline constexpr ffi::DataType kDataType<bfloat16> = ffi::BF16;
template <>
inline constexpr ffi::DataType kDataType<uint8_t> = ffi::U8;
template <>
inline constexpr ffi::DataType kDataType<int8_t> = ffi::S8;

// What a product takes: its gradients have g, the gradient of y, too.
struct Operands {
  const ffi::AnyBuffer& x;
  const ffi::AnyBuffer& w;
  const ffi::AnyBuffer* g = nullptr;

  // The arrays of `rank` dimensions.
  std::vector<Mapped> Arrays(size_t rank) const {
    std::vector<Mapped> arrays = {{"x", x.dimensions(), rank}, {"w", w.dimensions(), rank}};
    if (g != nullptr) arrays.push_back({"g", g->dimensions(), rank});
    return arrays;
  }
};

template <typename T>
const T* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

template <typename T, typename F>
bool CallIf(ffi::DataType dtype, F& f) {
  if (dtype != kDataType<T>) return false;
  f(T{});
  return true;
}

// Calls f with a value of the operands' element type, which is one of Ts.
template <typename... Ts, typename F>
ffi::Error ForType(const Operands& operands, F f) {
  const ffi::DataType dtype = operands.x.element_type();
  return Try([&] {
    if (operands.w.element_type() != dtype ||
        (operands.g != nullptr && operands.g->element_type() != dtype)) {
      Refuse("the operands have different types");
    }
    if (!(CallIf<Ts>(dtype, f) || ...)) Refuse("the product does not take operands of this type");
  });
}

// Of which array a product's result has the shape.
enum class Like { kY, kX, kW };

void RequireFewTerms(int64_t terms) {
  if (terms > kMostByteTerms) {
    Refuse("an int32 holds the sum of " + std::to_string(kMostByteTerms) +
           " differences of bytes, not of " + std::to_string(terms));
  }
}

struct Matmuls {
  MatmulShape shape;
  Mapping mapping;
  int64_t result_size;

  static Matmuls Read(const Operands& operands, const Mapped& result, Like like) {
    std::vector<Mapped> arrays = operands.Arrays(3);
    const Shape x = arrays[0].inner, w = arrays[1].inner, y = {x[0], x[1], w[2]};
    if (x[2] != w[1] || (w[0] != x[0] && w[0] != 1)) {
      Refuse("x " + Text(x) + " and w " + Text(w) + " are not (B, M, K) and (B, K, N)");
    }
    if (operands.g != nullptr) RequireShape("g", arrays[2].inner, y);
    const Shape each_w = {x[0], w[1], w[2]};
    RequireShape("the result", result.inner, like == Like::kY ? y : like == Like::kX ? x : each_w);
    return {{x[0], x[1], x[2], w[2], w[0]}, Mapping(std::move(arrays), result), result.size};
  }

  // Makes one matmul of more rows, where all share w; returns how many there are.
  int64_t MergeRows() {
    const int64_t count = mapping.Count();
    if (count == 0 || shape.w_batch != 1 || !mapping.OnlyKernelIsShared()) return count;
    shape.batch *= count;
    result_size *= count;
    return 1;
  }
};

// Calls product(shape, x, w, g, out) for each result, of operands that have one of the types Ts. The
// results of operands that share w are one, unless they are like w.
template <typename... Ts, typename Result, typename F>
ffi::Error ForMatmuls(const Operands& operands, Result& result, Like like, F product) {
  return ForType<Ts...>(operands, [&](auto zero) {
    using T = decltype(zero);
    const Mapped whole("the result", result->dimensions(), 3);
    Matmuls all = Matmuls::Read(operands, whole, like);
    if constexpr (std::is_integral_v<T>) RequireFewTerms(all.shape.depth);
    const int64_t count = like == Like::kW ? all.mapping.Count() : all.MergeRows();
    for (int64_t i = 0; i < count; ++i) {
      product(all.shape, Data<T>(operands.x) + all.mapping.Offset(0, i),
              Data<T>(operands.w) + all.mapping.Offset(1, i),
              operands.g == nullptr ? nullptr : Data<T>(*operands.g) + all.mapping.Offset(2, i),
              result->typed_data() + i * all.result_size);
    }
  });
}

// ψ(d) = clip(scale · d, -bound, bound).
struct Clip {
  double scale, bound;

  Clip(double scale, double bound) : scale(scale), bound(bound) {
    const bool finite = std::isfinite(scale) || std::isfinite(bound);
    if (!(scale > 0 && bound > 0 && finite)) {
      Refuse("scale and bound must be positive, and one of them finite");
    }
  }
};

ffi::Error MultiplyMatrices(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                            FloatResult y, Product product) {
  XlaPool pool(threads);
  return ForMatmuls<float, bfloat16>(
      {x, w}, y, Like::kY, [&](const MatmulShape& s, auto* x, auto* w, auto*, float* y) {
        Matmul(SelectKernels(), pool, s, product, x, w, y);
      });
}

ffi::Error MatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, FloatResult y,
                      bool fast) {
  return MultiplyMatrices(threads, x, w, y, fast ? Product::kMax : Product::kAbs);
}

template <bool kPairs>
ffi::Error EuclidMatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                            FloatResult y) {
  return MultiplyMatrices(threads, x, w, y, kPairs ? Product::kPairSquare : Product::kSquare);
}

ffi::Error Int16MatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                           FloatResult y) {
  return MultiplyMatrices(threads, x, w, y, Product::kPairMax);
}

template <bool kPairs>
ffi::Error MatmulDxImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                        ffi::AnyBuffer g, FloatResult dx, double scale, double bound) {
  XlaPool pool(threads);
  return ForMatmuls<float, bfloat16>(
      {x, w, &g}, dx, Like::kX, [&](const MatmulShape& s, auto* x, auto* w, auto* g, float* dx) {
        const Clip clip(scale, bound);
        const Form form = Form::Gradient(clip.scale, clip.bound);
        MatmulDx(SelectKernels(), pool, s, form, kPairs, x, w, g, dx);
      });
}

template <bool kPairs>
ffi::Error MatmulDwImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                        ffi::AnyBuffer g, FloatResult dw, double scale, double bound) {
  XlaPool pool(threads);
  return ForMatmuls<float, bfloat16>(
      {x, w, &g}, dw, Like::kW, [&](const MatmulShape& s, auto* x, auto* w, auto* g, float* dw) {
        const Clip clip(scale, bound);
        MatmulDw(SelectKernels(), pool, s, clip.scale, clip.bound, kPairs, x, w, g, dw);
      });
}

ffi::Error IntegerMatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                             IntegerResult y) {
  XlaPool pool(threads);
  return ForMatmuls<uint8_t, int8_t>(
      {x, w}, y, Like::kY, [&](const MatmulShape& s, auto* x, auto* w, auto*, int32_t* y) {
        IntegerMatmul(SelectIntegerKernels(), pool, s, x, w, y);
      });
}

// The attributes of a convolution's window.
struct WindowAttributes {
  Sizes strides, padding, lhs_dilation, rhs_dilation;
  int64_t groups;
};

struct Convs {
  ConvShape shape;
  Mapping mapping;
  int64_t result_size;

  static Convs Read(const Operands& operands, const Mapped& result, const WindowAttributes& given,
                    Like like) {
    std::vector<Mapped> arrays = operands.Arrays(4);
    const Shape x = arrays[0].inner, w = arrays[1].inner;
    if (given.strides.size() != 2 || given.padding.size() != 4 || given.lhs_dilation.size() != 2 ||
        given.rhs_dilation.size() != 2) {
      Refuse("a window has two strides, two pairs of paddings and two dilations of each kind");
    }
    if (given.groups < 1 || x[3] % given.groups != 0 || x[3] / given.groups != w[2] ||
        w[3] % given.groups != 0) {
      Refuse("x " + Text(x) + " and w " + Text(w) + " are not (B, H, W, C) and (P, Q, C / G, F) for " +
             std::to_string(given.groups) + " groups G");
    }
    ConvShape s;
    s.batch = x[0];
    s.channels = x[3];
    s.filters = w[3];
    s.groups = given.groups;
    for (int d = 0; d < 2; ++d) {
      s.in[d] = x[1 + d];
      s.window[d] = w[d];
      s.stride[d] = Factor("a stride", given.strides[d], 1);
      s.lhs_dilation[d] = Factor("a dilation", given.lhs_dilation[d], 1);
      s.rhs_dilation[d] = Factor("a dilation", given.rhs_dilation[d], 1);
      s.low_padding[d] = Factor("a padding", given.padding[2 * d], -kMostFactor);
      s.out[d] = OutSize(s, d, Factor("a padding", given.padding[2 * d + 1], -kMostFactor));
    }
    const Shape y = {x[0], s.out[0], s.out[1], w[3]};
    if (operands.g != nullptr) RequireShape("g", arrays[2].inner, y);
    RequireShape("the result", result.inner, like == Like::kY ? y : like == Like::kX ? x : w);
    return {s, Mapping(std::move(arrays), result), result.size};
  }

  // Makes one convolution of more images, where all share w; returns how many there are.
  int64_t MergeImages() {
    const int64_t count = mapping.Count();
    if (count == 0 || !mapping.OnlyKernelIsShared()) return count;
    shape.batch *= count;
    result_size *= count;
    return 1;
  }

  // Whether the result has values, and those are sums of more than nothing.
  bool HasTerms(Like like) const {
    if (result_size == 0) return false;
    if (like == Like::kY) return shape.channels > 0;
    const bool outputs = shape.out[0] > 0 && shape.out[1] > 0;
    return outputs && (like == Like::kX ? shape.filters : shape.batch) > 0;
  }

 private:
  static int64_t Factor(const char* name, int64_t value, int64_t least) {
    if (value < least || value > kMostFactor) {
      Refuse(std::string(name) + " of " + std::to_string(value) + " is not between " +
             std::to_string(least) + " and " + std::to_string(kMostFactor));
    }
    return value;
  }

  // How long `size` values are with zeros between them.
  static int64_t Span(int64_t size, int64_t dilation) {
    if (size == 0) return 0;
    if (size - 1 > kMostPosition / dilation) Refuse("an image or window with its dilation is too large");
    return (size - 1) * dilation + 1;
  }

  static int64_t OutSize(const ConvShape& s, int d, int64_t high_padding) {
    if (s.window[d] == 0) return 0;
    const int64_t room = Span(s.in[d], s.lhs_dilation[d]) + s.low_padding[d] + high_padding -
                         Span(s.window[d], s.rhs_dilation[d]);
    return room < 0 ? 0 : room / s.stride[d] + 1;
  }
};

// Calls product(shape, x, w, g, out) for each result that is not all zeros, of operands that have one
// of the types Ts. The results of images that share w are one, unless they are like w.
template <typename... Ts, typename Result, typename F>
ffi::Error ForConvs(const Operands& operands, Result& result, const WindowAttributes& window,
                    Like like, F product) {
  return ForType<Ts...>(operands, [&](auto zero) {
    using T = decltype(zero);
    const Mapped whole("the result", result->dimensions(), 4);
    Convs all = Convs::Read(operands, whole, window, like);
    const int64_t count = like == Like::kW ? all.mapping.Count() : all.MergeImages();
    auto* out = result->typed_data();
    if (!all.HasTerms(like)) {
      std::fill_n(out, count * all.result_size, 0);
      return;
    }
    if constexpr (std::is_integral_v<T>) {
      const ConvShape& s = all.shape;
      RequireFewTerms(s.window[0] * s.window[1] * (s.channels / s.groups));
    }
    for (int64_t i = 0; i < count; ++i) {
      product(all.shape, Data<T>(operands.x) + all.mapping.Offset(0, i),
              Data<T>(operands.w) + all.mapping.Offset(1, i),
              operands.g == nullptr ? nullptr : Data<T>(*operands.g) + all.mapping.Offset(2, i),
              out + i * all.result_size);
    }
  });
}

ffi::Error Convolve(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, FloatResult y,
                    const WindowAttributes& window, Product product) {
  XlaPool pool(threads);
  return ForConvs<float, bfloat16>(
      {x, w}, y, window, Like::kY, [&](const ConvShape& s, auto* x, auto* w, auto*, float* y) {
        Conv(SelectKernels(), pool, s, product, x, w, y);
      });
}

ffi::Error ConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, FloatResult y,
                    Sizes strides, Sizes padding, Sizes lhs_dilation, Sizes rhs_dilation,
                    int64_t groups, bool fast) {
  return Convolve(threads, x, w, y, {strides, padding, lhs_dilation, rhs_dilation, groups},
                  fast ? Product::kMax : Product::kAbs);
}

template <bool kPairs>
ffi::Error EuclidConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                          FloatResult y, Sizes strides, Sizes padding, Sizes lhs_dilation,
                          Sizes rhs_dilation, int64_t groups) {
  return Convolve(threads, x, w, y, {strides, padding, lhs_dilation, rhs_dilation, groups},
                  kPairs ? Product::kPairSquare : Product::kSquare);
}

ffi::Error Int16ConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                         FloatResult y, Sizes strides, Sizes padding, Sizes lhs_dilation,
                         Sizes rhs_dilation, int64_t groups) {
  return Convolve(threads, x, w, y, {strides, padding, lhs_dilation, rhs_dilation, groups},
                  Product::kPairMax);
}

template <bool kPairs>
ffi::Error ConvDxImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                      ffi::AnyBuffer g, FloatResult dx, Sizes strides, Sizes padding,
                      Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups, double scale,
                      double bound) {
  XlaPool pool(threads);
  return ForConvs<float, bfloat16>(
      {x, w, &g}, dx, {strides, padding, lhs_dilation, rhs_dilation, groups}, Like::kX,
      [&](const ConvShape& s, auto* x, auto* w, auto* g, float* dx) {
        const Clip clip(scale, bound);
        const Form form = Form::Gradient(clip.scale, clip.bound);
        ConvDx(SelectKernels(), pool, s, form, kPairs, x, w, g, dx);
      });
}

template <bool kPairs>
ffi::Error ConvDwImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                      ffi::AnyBuffer g, FloatResult dw, Sizes strides, Sizes padding,
                      Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups, double scale,
                      double bound) {
  XlaPool pool(threads);
  return ForConvs<float, bfloat16>(
      {x, w, &g}, dw, {strides, padding, lhs_dilation, rhs_dilation, groups}, Like::kW,
      [&](const ConvShape& s, auto* x, auto* w, auto* g, float* dw) {
        const Clip clip(scale, bound);
        ConvDw(SelectKernels(), pool, s, clip.scale, clip.bound, kPairs, x, w, g, dw);
      });
}

ffi::Error IntegerConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                           IntegerResult y, Sizes strides, Sizes padding, Sizes lhs_dilation,
                           Sizes rhs_dilation, int64_t groups) {
  XlaPool pool(threads);
  return ForConvs<uint8_t, int8_t>(
      {x, w}, y, {strides, padding, lhs_dilation, rhs_dilation, groups}, Like::kY,
      [&](const ConvShape& s, auto* x, auto* w, auto*, int32_t* y) {
        IntegerConv(SelectIntegerKernels(), pool, s, x, w, y);
      });
}

auto Bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>();
}

auto BindY() { return Bind().Ret<ffi::Buffer<ffi::F32>>(); }
auto BindIntegers() { return Bind().Ret<ffi::Buffer<ffi::S32>>(); }
auto BindGradient() { return Bind().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>(); }

template <typename Binding>
auto WithWindow(Binding binding) {
  return std::move(binding)
      .template Attr<Sizes>("strides")
      .template Attr<Sizes>("padding")
      .template Attr<Sizes>("lhs_dilation")
      .template Attr<Sizes>("rhs_dilation")
      .template Attr<int64_t>("groups");
}

template <typename Binding>
auto WithClip(Binding binding) {
  return std::move(binding).template Attr<double>("scale").template Attr<double>("bound");
}

}  // namespace
}  // namespace jadder

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul, jadder::MatmulImpl,
                              jadder::BindY().Attr<bool>("fast"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul_dx, jadder::MatmulDxImpl<false>,
                              jadder::WithClip(jadder::BindGradient()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul_dw, jadder::MatmulDwImpl<false>,
                              jadder::WithClip(jadder::BindGradient()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv, jadder::ConvImpl,
                              jadder::WithWindow(jadder::BindY()).Attr<bool>("fast"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv_dx, jadder::ConvDxImpl<false>,
                              jadder::WithClip(jadder::WithWindow(jadder::BindGradient())));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv_dw, jadder::ConvDwImpl<false>,
                              jadder::WithClip(jadder::WithWindow(jadder::BindGradient())));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_euclid_matmul, jadder::EuclidMatmulImpl<false>,
                              jadder::BindY());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_euclid_conv, jadder::EuclidConvImpl<false>,
                              jadder::WithWindow(jadder::BindY()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_euclid_matmul, jadder::EuclidMatmulImpl<true>,
                              jadder::BindY());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_euclid_conv, jadder::EuclidConvImpl<true>,
                              jadder::WithWindow(jadder::BindY()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_matmul, jadder::Int16MatmulImpl, jadder::BindY());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_matmul_dx, jadder::MatmulDxImpl<true>,
                              jadder::WithClip(jadder::BindGradient()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_matmul_dw, jadder::MatmulDwImpl<true>,
                              jadder::WithClip(jadder::BindGradient()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_conv, jadder::Int16ConvImpl,
                              jadder::WithWindow(jadder::BindY()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_conv_dx, jadder::ConvDxImpl<true>,
                              jadder::WithClip(jadder::WithWindow(jadder::BindGradient())));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_int16_conv_dw, jadder::ConvDwImpl<true>,
                              jadder::WithClip(jadder::WithWindow(jadder::BindGradient())));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_integer_matmul, jadder::IntegerMatmulImpl,
                              jadder::BindIntegers());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_integer_conv, jadder::IntegerConvImpl,
                              jadder::WithWindow(jadder::BindIntegers()));

// The instruction set in use. VNNI counts as part of AVX-512.
extern "C" const char* jadder_isa() {
  const char* name = jadder::SelectKernels().name;
  return std::strcmp(name, "avx512vnni") == 0 ? "avx512" : name;
}

// Whose headers this was built with: an older XLA refuses to start with handlers of a newer one.
extern "C" const char* jadder_jaxlib_version() { return JADDER_JAXLIB_VERSION; }

#pragma GCC visibility pop
