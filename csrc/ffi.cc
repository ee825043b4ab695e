// The functions that XLA calls.
//
// Dimensions before those of the product itself come from vmap: each operand has them all, of the
// mapped size or of size 1, and the result of the mapped size.

#include <functional>
#include <new>
#include <utility>
#include <vector>

#include "integers.h"
#include "products.h"
#include "types.h"
#include "xla/ffi/api/ffi.h"

namespace jadder {
namespace {

namespace ffi = xla::ffi;
using Sizes = ffi::Span<const int64_t>;
using FloatResult = ffi::Result<ffi::Buffer<ffi::F32>>;
using AnyResult = ffi::Result<ffi::AnyBuffer>;
using IntegerResult = ffi::Result<ffi::Buffer<ffi::S32>>;

class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t threads() const override { return pool_.num_threads(); }
  void Schedule(std::function<void()> work) override { pool_.Schedule(std::move(work)); }

 private:
  ffi::ThreadPool pool_;
};

ffi::Error Invalid(const char* text) { return ffi::Error::InvalidArgument(text); }

// An operand or result of `rank` dimensions, and those that vmap put before them.
struct Mapped {
  std::vector<int64_t> outer, inner;
  int64_t size = 1;  // of the inner dimensions

  Mapped(ffi::AnyBuffer::Dimensions dimensions, size_t rank) {
    for (size_t d = 0; d < dimensions.size(); ++d) {
      (d + rank < dimensions.size() ? outer : inner).push_back(dimensions[d]);
    }
    for (const int64_t n : inner) size = CheckedProduct(size, n);
  }
  bool Shared() const {  // by all that is mapped
    for (const int64_t n : outer) {
      if (n != 1) return false;
    }
    return true;
  }
  int64_t Count() const {
    int64_t count = 1;
    for (const int64_t n : outer) count = CheckedProduct(count, n);
    return count;
  }
};

// The positions of the operands, in elements, for each result in turn.
class Mapping {
 public:
  // The largest of the operands' sizes is the result's.
  static bool Make(std::vector<Mapped> operands, Mapping& mapping) {
    mapping.operands_ = std::move(operands);
    mapping.outer_ = mapping.operands_[0].outer;
    for (const Mapped& operand : mapping.operands_) {
      if (operand.outer.size() != mapping.outer_.size()) return false;
      for (size_t d = 0; d < operand.outer.size(); ++d) {
        if (mapping.outer_[d] == 1) mapping.outer_[d] = operand.outer[d];
      }
    }
    for (const Mapped& operand : mapping.operands_) {
      for (size_t d = 0; d < operand.outer.size(); ++d) {
        if (operand.outer[d] != 1 && operand.outer[d] != mapping.outer_[d]) return false;
      }
    }
    return true;
  }

  int64_t Count() const {
    int64_t count = 1;
    for (const int64_t n : outer_) count = CheckedProduct(count, n);
    return count;
  }

  // Where operand `which` begins for result `index`.
  int64_t Offset(int which, int64_t index) const {
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
  std::vector<Mapped> operands_;
  std::vector<int64_t> outer_;
};

template <typename T>
inline constexpr ffi::DataType kDataType = ffi::F32;
template <>
inline constexpr ffi::DataType kDataType<bfloat16> = ffi::BF16;
template <>
inline constexpr ffi::DataType kDataType<uint8_t> = ffi::U8;
template <>
inline constexpr ffi::DataType kDataType<int8_t> = ffi::S8;

template <typename T, typename F>
bool CallIf(ffi::DataType dtype, F& f) {
  if (dtype != kDataType<T>) return false;
  f(T{});
  return true;
}

// Calls f with a value of the element type, which is one of Ts.
template <typename... Ts, typename F>
ffi::Error ForType(ffi::DataType dtype, F f) {
  try {
    if ((CallIf<Ts>(dtype, f) || ...)) return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jadder: out of memory");
  }
  return Invalid("jadder: the product does not take operands of this type");
}

template <typename T>
const T* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

// Of a buffer that holds the same type as another pointer points to.
template <typename T>
const T* DataLike(const T*, const ffi::AnyBuffer& buffer) {
  return Data<T>(buffer);
}

struct Matmuls {
  MatmulShape shape;
  Mapping mapping;  // of x, w and, if there is one, g
  bool shared_w;

  bool Read(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer* g) {
    std::vector<Mapped> operands = {Mapped(x.dimensions(), 3), Mapped(w.dimensions(), 3)};
    if (g != nullptr) operands.push_back(Mapped(g->dimensions(), 3));
    for (const Mapped& operand : operands) {
      if (operand.inner.size() != 3) return false;
    }
    const auto &a = operands[0].inner, &b = operands[1].inner;
    shape = {a[0], a[1], a[2], b[2], b[0]};
    shared_w = operands[1].Shared() && operands[0].Count() > 1 && b[0] == 1;
    if (g != nullptr) {
      shared_w = shared_w && operands[2].Count() == operands[0].Count();
      const auto& c = operands[2].inner;
      if (c[0] != a[0] || c[1] != a[1] || c[2] != b[2]) return false;
      if (g->element_type() != x.element_type()) return false;
    }
    const int64_t count = operands[0].Count();
    if (!Mapping::Make(std::move(operands), mapping)) return false;
    shared_w = shared_w && mapping.Count() == count;
    return a[2] == b[1] && (b[0] == a[0] || b[0] == 1) && x.element_type() == w.element_type();
  }

  // One matmul of more rows, where all share w.
  int64_t MergeRows() {
    if (!shared_w) return mapping.Count();
    shape.batch = CheckedProduct(shape.batch, mapping.Count());
    return 1;
  }
};

// Calls product(shape, x, w, g, i) for each result i, whose operands have one of the types Ts. The
// results of operands that share w are one, if `merge`.
template <typename... Ts, typename F>
ffi::Error ForMatmuls(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer* g,
                      bool merge, F product) {
  bool valid = true;
  const ffi::Error error = ForType<Ts...>(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Matmuls all;
    if (!(valid = all.Read(x, w, g))) return;
    const int64_t count = merge ? all.MergeRows() : all.mapping.Count();
    for (int64_t i = 0; i < count; ++i) {
      product(all.shape, Data<T>(x) + all.mapping.Offset(0, i),
              Data<T>(w) + all.mapping.Offset(1, i),
              g == nullptr ? nullptr : Data<T>(*g) + all.mapping.Offset(2, i), i);
    }
  });
  return valid ? error : Invalid("jadder: matmul operands do not match");
}

ffi::Error MatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, FloatResult y,
                      bool fast) {
  XlaPool pool(threads);
  return ForMatmuls<float, bfloat16>(
      x, w, nullptr, true, [&](const MatmulShape& s, auto* x, auto* w, auto*, int64_t i) {
        Matmul(SelectKernels(), pool, s, fast ? Product::kMax : Product::kAbs, x, w,
               y->typed_data() + i * s.batch * s.rows * s.columns);
      });
}

ffi::Error MatmulDxImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                        ffi::AnyBuffer g, FloatResult dx, double scale, double bound) {
  XlaPool pool(threads);
  return ForMatmuls<float, bfloat16>(
      x, w, &g, true, [&](const MatmulShape& s, auto* x, auto* w, auto* g, int64_t i) {
        MatmulDx(SelectKernels(), pool, s, Form::Gradient(scale, bound), x, w, g,
                 dx->typed_data() + i * s.batch * s.rows * s.depth);
      });
}

ffi::Error MatmulDwImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                        ffi::AnyBuffer g, FloatResult dw, double scale, double bound) {
  XlaPool pool(threads);
  return ForMatmuls<float, bfloat16>(
      x, w, &g, false, [&](const MatmulShape& s, auto* x, auto* w, auto* g, int64_t i) {
        MatmulDw(SelectKernels(), pool, s, scale, bound, x, w, g,
                 dw->typed_data() + i * s.batch * s.depth * s.columns);
      });
}

ffi::Error IntegerMatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                             IntegerResult y) {
  XlaPool pool(threads);
  return ForMatmuls<uint8_t, int8_t>(
      x, w, nullptr, true, [&](const MatmulShape& s, auto* x, auto* w, auto*, int64_t i) {
        IntegerMatmul(SelectIntegerKernels(), pool, s, x, w,
                      y->typed_data() + i * s.batch * s.rows * s.columns);
      });
}

// The attributes of a convolution's window.
struct WindowAttributes {
  Sizes strides, padding, lhs_dilation, rhs_dilation;
  int64_t groups;
};

struct Convs {
  ConvShape shape;
  Mapping mapping;  // of x, w and the output or its gradient
  bool shared_w;

  bool Read(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer& y,
            const WindowAttributes& given) {
    std::vector<Mapped> operands = {Mapped(x.dimensions(), 4), Mapped(w.dimensions(), 4),
                                    Mapped(y.dimensions(), 4)};
    for (const Mapped& operand : operands) {
      if (operand.inner.size() != 4) return false;
    }
    const auto &a = operands[0].inner, &b = operands[1].inner, &c = operands[2].inner;
    if (given.strides.size() != 2 || given.padding.size() != 4 || given.lhs_dilation.size() != 2 ||
        given.rhs_dilation.size() != 2 || given.groups < 1 || a[3] % given.groups != 0 ||
        a[3] / given.groups != b[2] || b[3] % given.groups != 0 || c[0] != a[0] || c[3] != b[3] ||
        x.element_type() != w.element_type()) {
      return false;
    }
    shape.batch = a[0];
    shape.channels = a[3];
    shape.filters = b[3];
    shape.groups = given.groups;
    for (int d = 0; d < 2; ++d) {
      shape.in[d] = a[1 + d];
      shape.window[d] = b[d];
      shape.out[d] = c[1 + d];
      shape.stride[d] = given.strides[d];
      shape.low_padding[d] = given.padding[2 * d];
      shape.lhs_dilation[d] = given.lhs_dilation[d];
      shape.rhs_dilation[d] = given.rhs_dilation[d];
      if (shape.stride[d] < 1 || shape.lhs_dilation[d] < 1 || shape.rhs_dilation[d] < 1) {
        return false;
      }
    }
    shared_w = operands[1].Shared() && operands[0].outer == operands[2].outer;
    return Mapping::Make(std::move(operands), mapping);
  }

  // One convolution of more images, where all share w.
  int64_t MergeImages() {
    if (!shared_w) return mapping.Count();
    shape.batch = CheckedProduct(shape.batch, mapping.Count());
    return 1;
  }
};

// Calls product(shape, x, w, y_offset, i) for each result i, whose operands have one of the types
// Ts; y is the output or its gradient. The results of images that share w are one, if `merge`.
template <typename... Ts, typename F>
ffi::Error ForConvs(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer& y,
                    ffi::DataType y_type, const WindowAttributes& window, bool merge, F product) {
  bool valid = y.element_type() == y_type;
  const ffi::Error error = ForType<Ts...>(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Convs all;
    valid = valid && all.Read(x, w, y, window);
    if (!valid) return;
    const int64_t count = merge ? all.MergeImages() : all.mapping.Count();
    for (int64_t i = 0; i < count; ++i) {
      product(all.shape, Data<T>(x) + all.mapping.Offset(0, i),
              Data<T>(w) + all.mapping.Offset(1, i), all.mapping.Offset(2, i), i);
    }
  });
  return valid ? error : Invalid("jadder: convolution operands do not match");
}

ffi::Error ConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, AnyResult y,
                    Sizes strides, Sizes padding, Sizes lhs_dilation, Sizes rhs_dilation,
                    int64_t groups, bool fast) {
  XlaPool pool(threads);
  return ForConvs<float, bfloat16>(
      x, w, *y, ffi::F32, {strides, padding, lhs_dilation, rhs_dilation, groups}, true,
      [&](const ConvShape& s, auto* x, auto* w, int64_t offset, int64_t) {
        Conv(SelectKernels(), pool, s, fast ? Product::kMax : Product::kAbs, x, w,
             static_cast<float*>(y->untyped_data()) + offset);
      });
}

ffi::Error ConvDxImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                      ffi::AnyBuffer g, FloatResult dx, Sizes strides, Sizes padding,
                      Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups, double scale,
                      double bound) {
  XlaPool pool(threads);
  return ForConvs<float, bfloat16>(
      x, w, g, x.element_type(), {strides, padding, lhs_dilation, rhs_dilation, groups}, true,
      [&](const ConvShape& s, auto* x, auto* w, int64_t offset, int64_t i) {
        ConvDx(SelectKernels(), pool, s, Form::Gradient(scale, bound), x, w,
               DataLike(x, g) + offset, dx->typed_data() + i * s.batch * s.in[0] * s.in[1] * s.channels);
      });
}

ffi::Error ConvDwImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                      ffi::AnyBuffer g, FloatResult dw, Sizes strides, Sizes padding,
                      Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups, double scale,
                      double bound) {
  XlaPool pool(threads);
  return ForConvs<float, bfloat16>(
      x, w, g, x.element_type(), {strides, padding, lhs_dilation, rhs_dilation, groups}, false,
      [&](const ConvShape& s, auto* x, auto* w, int64_t offset, int64_t i) {
        const int64_t size = s.window[0] * s.window[1] * (s.channels / s.groups) * s.filters;
        ConvDw(SelectKernels(), pool, s, scale, bound, x, w, DataLike(x, g) + offset,
               dw->typed_data() + i * size);
      });
}

ffi::Error IntegerConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                           AnyResult y, Sizes strides, Sizes padding, Sizes lhs_dilation,
                           Sizes rhs_dilation, int64_t groups) {
  XlaPool pool(threads);
  return ForConvs<uint8_t, int8_t>(
      x, w, *y, ffi::S32, {strides, padding, lhs_dilation, rhs_dilation, groups}, true,
      [&](const ConvShape& s, auto* x, auto* w, int64_t offset, int64_t) {
        IntegerConv(SelectIntegerKernels(), pool, s, x, w,
                    static_cast<int32_t*>(y->untyped_data()) + offset);
      });
}

auto Bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>();
}

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadder_matmul, jadder::MatmulImpl,
    jadder::Bind().Ret<xla::ffi::Buffer<xla::ffi::F32>>().Attr<bool>("fast"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul_dx, jadder::MatmulDxImpl,
                              jadder::WithClip(jadder::BindGradient()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul_dw, jadder::MatmulDwImpl,
                              jadder::WithClip(jadder::BindGradient()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadder_conv, jadder::ConvImpl,
    jadder::WithWindow(jadder::Bind().Ret<xla::ffi::AnyBuffer>()).Attr<bool>("fast"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv_dx, jadder::ConvDxImpl,
                              jadder::WithClip(jadder::WithWindow(jadder::BindGradient())));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv_dw, jadder::ConvDwImpl,
                              jadder::WithClip(jadder::WithWindow(jadder::BindGradient())));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_integer_matmul, jadder::IntegerMatmulImpl,
                              jadder::Bind().Ret<xla::ffi::Buffer<xla::ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_integer_conv, jadder::IntegerConvImpl,
                              jadder::WithWindow(jadder::Bind().Ret<xla::ffi::AnyBuffer>()));

// The instruction set in use.
extern "C" const char* jadder_isa() { return jadder::SelectKernels().name; }

// Whose headers this was built with: an older XLA refuses to start with handlers of a newer one.
extern "C" const char* jadder_jaxlib_version() { return JADDER_JAXLIB_VERSION; }

#pragma GCC visibility pop
