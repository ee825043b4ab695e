// Aligned memory that is not initialised, and products of sizes that are checked.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace jadder {

// a · b for sizes, or std::bad_alloc where the product passes 2^62.
inline int64_t CheckedProduct(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product) || product > (int64_t{1} << 62)) {
    throw std::bad_alloc();
  }
  return product;
}

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { Resize(size); }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  // Makes room for `size` values and forgets what was there.
  void Resize(int64_t size) {
    if (size <= size_) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const int64_t bytes = CheckedProduct(size, sizeof(T));
    data_ = static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = size;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A thread's working memory, kept from call to call: callers ask for no more than a cache's worth.
template <typename Tag, typename T = float>
T* ThreadBuffer(int64_t size) {
  static thread_local Buffer<T> buffer;
  buffer.Resize(size);
  return buffer.data();
}

}  // namespace jadder
