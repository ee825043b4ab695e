// Element types.

#pragma once

#include <cstdint>
#include <cstring>

namespace jadder {

struct bfloat16 {
  uint16_t bits;
};

inline float ToFloat(float value) { return value; }
inline float ToFloat(bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// As a byte, in such a way that differences stay what they are: by turning the sign bit.
inline uint8_t ToByte(uint8_t value) { return value; }
inline uint8_t ToByte(int8_t value) { return static_cast<uint8_t>(value) ^ 0x80; }

}  // namespace jadder
