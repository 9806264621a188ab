// The rule by which a row of logits becomes a token: what every implementation of the draw computes, to the bit.
//
// Over the row x[0..V), upcast exactly to float32. Invalid when it holds NaN or its maximum is not finite.
//   T = 0: the lowest token of the maximum; the filters are not applied.
//   T > 0: z = (x - maximum) / T in float64, and the kept tokens are those that pass, in this order,
//     top-k  (0 < k < V)  x >= the k-th largest x;
//     top-p  (< 1)        the weights of the kept tokens of strictly larger x sum to less than top_p times all kept
//                         weights, or x is the maximum. Weights are integers: the order of summation changes nothing;
//     min-p  (> 0)        z >= log(min_p), or x is the maximum.
//   The token is the argmax of z + gumbel over the kept ones, ties to the lowest token.
// Each filter keeps the tokens from some logit up, so an implementation may look for three thresholds and take the
// largest; and it may discard a token on a float32 bound of z + gumbel, as long as float64 decides among the rest.
// Only log and log1p come from a library: a CPU's and a GPU's may differ in the last bit, which decides a draw only
// where two sums agree to 16 digits.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/device.h"

namespace taps {

constexpr int64_t kInvalidLogits = 1;  // status bit

TAPS_HD inline double scaled_logit(float logit, float maximum, double temperature) {
  return (static_cast<double>(logit) - static_cast<double>(maximum)) / temperature;
}

// ---- Noise ----

// A standard Gumbel variate from a random word: finite for each of the 2^32 words, from -3.14 to 22.88.
TAPS_HD inline double gumbel(uint32_t word) {
  const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
  return -log(-log1p(-uniform));
}

constexpr float kGumbelBound = 22.88f;

// At least gumbel(word), at most 0.07 above it where it is large, without a logarithm: gumbel <= -log(uniform), and a
// float's bits, read as an integer, are a lower bound of its log2 (off by at most 0.0861).
TAPS_HD inline float gumbel_bound(uint32_t word) {
  const float halved = static_cast<float>(static_cast<int32_t>(word >> 1));  // uniform * 2^31, rounded down
  int32_t bits;
  memcpy(&bits, &halved, sizeof(bits));
  constexpr float kLog2 = 0.693147181f;
  return (127 + 31) * kLog2 - static_cast<float>(bits) * (kLog2 * 0x1p-23f);
}

// Factor of (x - maximum), smaller than 1 / T by more than what float32 may lose, so that the product bounds z.
TAPS_HD inline float scale_of_bound(double temperature) {
  const double scale = (1 - 0x1p-20) / temperature;
  return scale < FLT_MAX ? static_cast<float>(scale) : FLT_MAX;
}

TAPS_HD inline float scaled_logit_bound(float logit, float maximum, float scale) {
  const float difference = logit - maximum;
  return (difference > -FLT_MAX ? difference : -FLT_MAX) * scale;
}

// What float32 may lose in adding two bounds and in storing the best value, with a wide margin.
constexpr float kBoundSlack = 1e-3f;

TAPS_HD inline bool beats(double value, int64_t token, double best_value, int64_t best_token) {
  return value > best_value || (value == best_value && token < best_token);
}

// ---- Weights for top-p ----

constexpr int64_t kLargestVocabulary = (int64_t{1} << 20) - 1;  // so that the sum of all weights fits in 64 bits
constexpr double kWeightless = -32;                             // weights are 0 from here down: exp(-32) * 2^44 is 0.22

// round(exp(z) * 2^44) for z <= 0. The exponential is spelled out (relative error below 1e-15), because those of
// different libraries differ in the last bit.
TAPS_HD inline uint64_t token_weight(double z) {
  constexpr double kRounder = 0x1.8p52;  // added to a small number, it leaves the nearest integer in the lowest bits
  const double shifted = z * 1.44269504088896338700 + kRounder;
  const double exponent = shifted - kRounder;
  const double r = (z - exponent * 6.93147180369123816490e-01) - exponent * 1.90821492927058770002e-10;  // |r| < 0.35
  double power = 1.0 / 6227020800;
  power = power * r + 1.0 / 479001600;
  power = power * r + 1.0 / 39916800;
  power = power * r + 1.0 / 3628800;
  power = power * r + 1.0 / 362880;
  power = power * r + 1.0 / 40320;
  power = power * r + 1.0 / 5040;
  power = power * r + 1.0 / 720;
  power = power * r + 1.0 / 120;
  power = power * r + 1.0 / 24;
  power = power * r + 1.0 / 6;
  power = power * r + 0.5;
  power = power * r + 1.0;
  power = power * r + 1.0;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  const uint64_t scale_bits = (bits << 52) + (uint64_t{1023 + 44} << 52);  // 2^(exponent + 44)
  double scale;
  memcpy(&scale, &scale_bits, sizeof(scale));
  const double rounded = power * scale + 0x1p52;
  memcpy(&bits, &rounded, sizeof(bits));
  const uint64_t is_heavy = 0 - static_cast<uint64_t>(z > kWeightless);  // a mask, not a branch: loops vectorise
  return bits & ((uint64_t{1} << 52) - 1) & is_heavy;
}

// Whether top-p has kept enough, once tokens of this weight are in.
TAPS_HD inline bool reaches(uint64_t weight, double limit) {
  return static_cast<double>(weight) >= limit;
}

}  // namespace taps
