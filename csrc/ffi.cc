// The functions that XLA calls.
//
// Dimensions before those of the product itself come from vmap: each operand has them all, of the
// mapped size or of size 1, and the result of the mapped size.

#include <functional>
#include <new>
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

// Calls f with a value of the element type, for the types that the products take.
template <typename F>
ffi::Error ForFloats(ffi::DataType dtype, F f) {
  try {
    if (dtype == ffi::F32) {
      f(float{});
      return ffi::Error::Success();
    }
    if (dtype == ffi::BF16) {
      f(bfloat16{});
      return ffi::Error::Success();
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jadder: out of memory");
  }
  return Invalid("jadder: operands must be float32 or bfloat16");
}

template <typename F>
ffi::Error ForBytes(ffi::DataType dtype, F f) {
  try {
    if (dtype == ffi::U8) {
      f(uint8_t{});
      return ffi::Error::Success();
    }
    if (dtype == ffi::S8) {
      f(int8_t{});
      return ffi::Error::Success();
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jadder: out of memory");
  }
  return Invalid("jadder: operands must be uint8 or int8");
}

template <typename T>
const T* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
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
  bool MergeRows() {
    if (!shared_w) return false;
    shape.batch = CheckedProduct(shape.batch, mapping.Count());
    return true;
  }
};

ffi::Error MatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, FloatResult y,
                      bool fast) {
  XlaPool pool(threads);
  bool valid = true;
  const ffi::Error error = ForFloats(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Matmuls all;
    if (!(valid = all.Read(x, w, nullptr))) return;
    const int64_t count = all.MergeRows() ? 1 : all.mapping.Count();
    const int64_t size = all.shape.batch * all.shape.rows * all.shape.columns;
    for (int64_t i = 0; i < count; ++i) {
      Matmul<T>(SelectKernels(), pool, all.shape, fast ? Product::kMax : Product::kAbs,
                Data<T>(x) + all.mapping.Offset(0, i), Data<T>(w) + all.mapping.Offset(1, i),
                y->typed_data() + i * size);
    }
  });
  return valid ? error : Invalid("jadder: matmul operands do not match");
}

ffi::Error MatmulDxImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                        ffi::AnyBuffer g, FloatResult dx, double scale, double bound) {
  XlaPool pool(threads);
  bool valid = true;
  const ffi::Error error = ForFloats(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Matmuls all;
    if (!(valid = all.Read(x, w, &g))) return;
    const int64_t count = all.MergeRows() ? 1 : all.mapping.Count();
    const int64_t size = all.shape.batch * all.shape.rows * all.shape.depth;
    for (int64_t i = 0; i < count; ++i) {
      MatmulDx<T>(SelectKernels(), pool, all.shape, Form::Gradient(scale, bound),
                  Data<T>(x) + all.mapping.Offset(0, i), Data<T>(w) + all.mapping.Offset(1, i),
                  Data<T>(g) + all.mapping.Offset(2, i), dx->typed_data() + i * size);
    }
  });
  return valid ? error : Invalid("jadder: matmul operands do not match");
}

ffi::Error MatmulDwImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                        ffi::AnyBuffer g, FloatResult dw, double scale, double bound) {
  XlaPool pool(threads);
  bool valid = true;
  const ffi::Error error = ForFloats(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Matmuls all;
    if (!(valid = all.Read(x, w, &g))) return;
    const int64_t size = all.shape.batch * all.shape.depth * all.shape.columns;
    for (int64_t i = 0; i < all.mapping.Count(); ++i) {
      MatmulDw<T>(SelectKernels(), pool, all.shape, scale, bound,
                  Data<T>(x) + all.mapping.Offset(0, i), Data<T>(w) + all.mapping.Offset(1, i),
                  Data<T>(g) + all.mapping.Offset(2, i), dw->typed_data() + i * size);
    }
  });
  return valid ? error : Invalid("jadder: matmul operands do not match");
}

struct Convs {
  ConvShape shape;
  Mapping mapping;  // of x, w and the output or its gradient
  bool shared_w;

  bool Read(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer& y,
            Sizes strides, Sizes padding, Sizes lhs_dilation, Sizes rhs_dilation,
            int64_t groups) {
    std::vector<Mapped> operands = {Mapped(x.dimensions(), 4), Mapped(w.dimensions(), 4),
                                    Mapped(y.dimensions(), 4)};
    for (const Mapped& operand : operands) {
      if (operand.inner.size() != 4) return false;
    }
    const auto &a = operands[0].inner, &b = operands[1].inner, &c = operands[2].inner;
    if (strides.size() != 2 || padding.size() != 4 || lhs_dilation.size() != 2 ||
        rhs_dilation.size() != 2 || groups < 1 || a[3] != b[2] * groups || b[3] % groups != 0 ||
        c[0] != a[0] || c[3] != b[3] || x.element_type() != w.element_type()) {
      return false;
    }
    shape.batch = a[0];
    shape.channels = a[3];
    shape.filters = b[3];
    shape.groups = groups;
    for (int d = 0; d < 2; ++d) {
      shape.in[d] = a[1 + d];
      shape.window[d] = b[d];
      shape.out[d] = c[1 + d];
      shape.stride[d] = strides[d];
      shape.low_padding[d] = padding[2 * d];
      shape.lhs_dilation[d] = lhs_dilation[d];
      shape.rhs_dilation[d] = rhs_dilation[d];
      if (strides[d] < 1 || lhs_dilation[d] < 1 || rhs_dilation[d] < 1) return false;
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

ffi::Error ConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                    ffi::Result<ffi::AnyBuffer> y, Sizes strides, Sizes padding,
                    Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups, bool fast) {
  XlaPool pool(threads);
  bool valid = y->element_type() == ffi::F32;
  const ffi::Error error = ForFloats(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Convs all;
    valid = valid &&
            all.Read(x, w, *y, strides, padding, lhs_dilation, rhs_dilation, groups);
    if (!valid) return;
    const int64_t count = all.MergeImages();
    for (int64_t i = 0; i < count; ++i) {
      Conv<T>(SelectKernels(), pool, all.shape, fast ? Product::kMax : Product::kAbs,
              Data<T>(x) + all.mapping.Offset(0, i), Data<T>(w) + all.mapping.Offset(1, i),
              static_cast<float*>(y->untyped_data()) + all.mapping.Offset(2, i));
    }
  });
  return valid ? error : Invalid("jadder: convolution operands do not match");
}

ffi::Error ConvDxImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                      ffi::AnyBuffer g, FloatResult dx, Sizes strides, Sizes padding,
                      Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups, double scale,
                      double bound) {
  XlaPool pool(threads);
  bool valid = g.element_type() == x.element_type();
  const ffi::Error error = ForFloats(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Convs all;
    valid = valid && all.Read(x, w, g, strides, padding, lhs_dilation, rhs_dilation, groups);
    if (!valid) return;
    const int64_t count = all.MergeImages();
    const int64_t size =
        all.shape.batch * all.shape.in[0] * all.shape.in[1] * all.shape.channels;
    for (int64_t i = 0; i < count; ++i) {
      ConvDx<T>(SelectKernels(), pool, all.shape, Form::Gradient(scale, bound),
                Data<T>(x) + all.mapping.Offset(0, i), Data<T>(w) + all.mapping.Offset(1, i),
                Data<T>(g) + all.mapping.Offset(2, i), dx->typed_data() + i * size);
    }
  });
  return valid ? error : Invalid("jadder: convolution operands do not match");
}

ffi::Error ConvDwImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                      ffi::AnyBuffer g, FloatResult dw, Sizes strides, Sizes padding,
                      Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups, double scale,
                      double bound) {
  XlaPool pool(threads);
  bool valid = g.element_type() == x.element_type();
  const ffi::Error error = ForFloats(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Convs all;
    valid = valid && all.Read(x, w, g, strides, padding, lhs_dilation, rhs_dilation, groups);
    if (!valid) return;
    const int64_t size = all.shape.window[0] * all.shape.window[1] *
                         (all.shape.channels / all.shape.groups) * all.shape.filters;
    for (int64_t i = 0; i < all.mapping.Count(); ++i) {
      ConvDw<T>(SelectKernels(), pool, all.shape, scale, bound,
                Data<T>(x) + all.mapping.Offset(0, i), Data<T>(w) + all.mapping.Offset(1, i),
                Data<T>(g) + all.mapping.Offset(2, i), dw->typed_data() + i * size);
    }
  });
  return valid ? error : Invalid("jadder: convolution operands do not match");
}

ffi::Error IntegerMatmulImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                             IntegerResult y) {
  XlaPool pool(threads);
  bool valid = true;
  const ffi::Error error = ForBytes(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Matmuls all;
    if (!(valid = all.Read(x, w, nullptr))) return;
    const int64_t count = all.MergeRows() ? 1 : all.mapping.Count();
    const int64_t size = all.shape.batch * all.shape.rows * all.shape.columns;
    for (int64_t i = 0; i < count; ++i) {
      IntegerMatmul<T>(SelectIntegerKernels(), pool, all.shape,
                       Data<T>(x) + all.mapping.Offset(0, i),
                       Data<T>(w) + all.mapping.Offset(1, i), y->typed_data() + i * size);
    }
  });
  return valid ? error : Invalid("jadder: matmul operands do not match");
}

ffi::Error IntegerConvImpl(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                           ffi::Result<ffi::AnyBuffer> y, Sizes strides, Sizes padding,
                           Sizes lhs_dilation, Sizes rhs_dilation, int64_t groups) {
  XlaPool pool(threads);
  bool valid = y->element_type() == ffi::S32;
  const ffi::Error error = ForBytes(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Convs all;
    valid = valid &&
            all.Read(x, w, *y, strides, padding, lhs_dilation, rhs_dilation, groups);
    if (!valid) return;
    const int64_t count = all.MergeImages();
    for (int64_t i = 0; i < count; ++i) {
      IntegerConv<T>(SelectIntegerKernels(), pool, all.shape,
                     Data<T>(x) + all.mapping.Offset(0, i),
                     Data<T>(w) + all.mapping.Offset(1, i),
                     static_cast<int32_t*>(y->untyped_data()) + all.mapping.Offset(2, i));
    }
  });
  return valid ? error : Invalid("jadder: convolution operands do not match");
}

auto Bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>();
}

}  // namespace
}  // namespace jadder

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul, jadder::MatmulImpl,
                              jadder::Bind()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("fast"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul_dx, jadder::MatmulDxImpl,
                              jadder::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<double>("bound"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_matmul_dw, jadder::MatmulDwImpl,
                              jadder::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<double>("scale")
                                  .Attr<double>("bound"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv, jadder::ConvImpl,
                              jadder::Bind()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<jadder::Sizes>("strides")
                                  .Attr<jadder::Sizes>("padding")
                                  .Attr<jadder::Sizes>("lhs_dilation")
                                  .Attr<jadder::Sizes>("rhs_dilation")
                                  .Attr<int64_t>("groups")
                                  .Attr<bool>("fast"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv_dx, jadder::ConvDxImpl,
                              jadder::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<jadder::Sizes>("strides")
                                  .Attr<jadder::Sizes>("padding")
                                  .Attr<jadder::Sizes>("lhs_dilation")
                                  .Attr<jadder::Sizes>("rhs_dilation")
                                  .Attr<int64_t>("groups")
                                  .Attr<double>("scale")
                                  .Attr<double>("bound"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_conv_dw, jadder::ConvDwImpl,
                              jadder::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<jadder::Sizes>("strides")
                                  .Attr<jadder::Sizes>("padding")
                                  .Attr<jadder::Sizes>("lhs_dilation")
                                  .Attr<jadder::Sizes>("rhs_dilation")
                                  .Attr<int64_t>("groups")
                                  .Attr<double>("scale")
                                  .Attr<double>("bound"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_integer_matmul, jadder::IntegerMatmulImpl,
                              jadder::Bind().Ret<xla::ffi::Buffer<xla::ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_integer_conv, jadder::IntegerConvImpl,
                              jadder::Bind()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<jadder::Sizes>("strides")
                                  .Attr<jadder::Sizes>("padding")
                                  .Attr<jadder::Sizes>("lhs_dilation")
                                  .Attr<jadder::Sizes>("rhs_dilation")
                                  .Attr<int64_t>("groups"));

// The instruction set in use.
extern "C" const char* jadder_isa() { return jadder::SelectKernels().name; }

// Whose headers this was built with: an older XLA refuses to start with handlers of a newer one.
extern "C" const char* jadder_jaxlib_version() { return JADDER_JAXLIB_VERSION; }

#pragma GCC visibility pop
