// The logit by which a drafter that is coupled to the target's draws ranks and scores a token: what every
// implementation computes, to the bit.
//
//   l(v) = (alpha / T) x(v) + beta gumbel(seed, position, v),   T > 0
//
// with the noise of common/sampling_rule.h, in float32 throughout: a drafter's logit is known less well than that. A
// logit of -inf stays -inf, one of +inf stays +inf, and only NaN gives NaN. At T = 0 there is no noise: l = x.
#pragma once

#include <cfloat>
#include <cstdint>

#include "common/device.h"
#include "common/logits_type.h"

namespace taps {

// exponent * log(2) + log(1 + r), r from sqrt(1/2) - 1 to sqrt(2) - 1: where the exponent is 0, to 3e-7 of the result.
// Coefficients: a minimax fit of the relative error.
TAPS_INLINE float log_of(float exponent, float r) {
  float power = -1.01917306e-1f;
  power = power * r + 1.60243811e-1f;
  power = power * r - 1.71371270e-1f;
  power = power * r + 1.99245034e-1f;
  power = power * r - 2.49832670e-1f;
  power = power * r + 3.33342457e-1f;
  power = power * r - 0.5f;
  power = power * r + 1.0f;
  return power * r + exponent * 0.693147181f;
}

// gumbel(word) of common/sampling_rule.h, off by 2e-6 at most: finite for each of the 2^32 words. Choices are masks,
// not branches, so that loops vectorise.
TAPS_INLINE float coupling_noise(uint32_t word) {
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  // The smaller of u and 1 - u is right to float32's last bit; the other one is too, where it matters.
  const uint32_t is_upper = static_cast<uint32_t>(static_cast<int32_t>(word) >> 31);
  const float smaller = (static_cast<float>(static_cast<int32_t>(word ^ is_upper)) + 0.5f) * 0x1p-32f;
  const float larger = 1.0f - smaller;
  // 1 - u as a power of 2 and a mantissa between sqrt(1/2) and sqrt(2), and its logarithm; near 1, from u itself.
  const uint32_t complement = ((bits_of(smaller) & is_upper) | (bits_of(larger) & ~is_upper)) - kSqrtHalf;
  const int32_t exponent = static_cast<int32_t>(complement) >> 23;
  const uint32_t is_near_1 = exponent == 0 ? ~0u : 0u;
  const float mantissa = float_from_bits((complement & 0x7FFFFFu) + kSqrtHalf) - 1.0f;
  const float r = float_from_bits((bits_of(-smaller) & is_near_1) | (bits_of(mantissa) & ~is_near_1));
  const uint32_t inner = bits_of(-log_of(static_cast<float>(exponent), r)) - kSqrtHalf;
  return -log_of(static_cast<float>(static_cast<int32_t>(inner) >> 23),
                 float_from_bits((inner & 0x7FFFFFu) + kSqrtHalf) - 1.0f);
}

// The values of one request that take a division, computed once.
struct Coupling {
  float scale;  // alpha / T
  float beta;

  TAPS_INLINE float operator()(float logit, float noise) const { return scale * logit + beta * noise; }
};

// Bounded on both sides: neither 0 nor infinity makes NaN of an infinite logit, and the noise stays finite.
TAPS_HD inline Coupling coupling_of(float temperature, float alpha, float beta) {
  constexpr float kMostBeta = FLT_MAX / 32;
  const float scale = alpha / temperature;
  return {scale < FLT_MIN ? FLT_MIN : scale < FLT_MAX ? scale : FLT_MAX, beta < kMostBeta ? beta : kMostBeta};
}

// Values are unchecked on a device: a temperature that is not above 0, or NaN, counts as 0.
TAPS_HD inline bool is_coupled(float temperature) {
  return temperature > 0 && temperature <= FLT_MAX;
}

}  // namespace taps
