// The element types of logits, and their exact conversion to float32, on the host and on the device.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/device.h"

namespace taps {

enum class LogitsType { kFloat32, kBFloat16, kFloat16 };

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TAPS_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

TAPS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Without a branch, for the vectoriser, and without a subnormal float32, which could be flushed to 0: a subnormal half
// is read as 2^-14 plus its value, and 2^-14 is taken off.
TAPS_INLINE float float_from_half(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(half));
  return converted;
#endif
  const uint32_t magnitude = half & 0x7FFFu;
  const uint32_t is_full = 0u - (magnitude >= 0x7C00u);  // all ones for infinity and NaN, which keep a full exponent
  const uint32_t is_subnormal = 0u - (magnitude < 0x0400u);
  const uint32_t bits = (magnitude << 13) + 0x38000000u + (is_full & 0x38000000u) + (is_subnormal & 0x00800000u);
  const float value = float_from_bits(bits) - float_from_bits(is_subnormal & 0x38800000u);
  return float_from_bits(bits_of(value) | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// The layout of one logit in memory.
template <LogitsType kType>
struct LogitsFormat;

template <>
struct LogitsFormat<LogitsType::kFloat32> {
  using Bits = uint32_t;
  static constexpr Bits kMinusInfinity = 0xFF800000u;
  static TAPS_INLINE float value(Bits bits) { return float_from_bits(bits); }
};

template <>
struct LogitsFormat<LogitsType::kBFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kMinusInfinity = 0xFF80u;
  static TAPS_INLINE float value(Bits bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
};

template <>
struct LogitsFormat<LogitsType::kFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kMinusInfinity = 0xFC00u;
  static TAPS_INLINE float value(Bits bits) { return float_from_half(bits); }
};

}  // namespace taps
