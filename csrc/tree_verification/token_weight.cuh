// The weight of a token in the search for a filter's cut, and z exactly as in the draw, on the device.
#pragma once

#include <cstdint>

#include "common/sampling_rule.h"

namespace taps::cuda {

// scaled_logit for many logits x of one row, to the bit and without divisions: a quotient by the rounded reciprocal,
// then two corrections by its exact remainder. The first leaves one of the two doubles around the true quotient, from
// which the second finds the nearest (Markstein, 1990). Nothing over- or underflows: all come from finite floats.
struct LogitScale {
  double temperature;
  double per_temperature;  // 1 / temperature

  __device__ double operator()(float logit, float maximum) const {
    const double difference = static_cast<double>(logit) - static_cast<double>(maximum);
    double z = difference * per_temperature;
    z = fma(fma(-temperature, z, difference), per_temperature, z);
    return fma(fma(-temperature, z, difference), per_temperature, z);
  }
};

enum class Weighing {
  kCount,  // one
  kRough,  // nearly token_weight, in float32: float64 is slow, on most devices very slow
  kExact,  // token_weight
};

struct TokenWeight {
  Weighing weighing;
  float maximum;
  LogitScale scale;

  __device__ uint64_t operator()(float logit) const {
    if (weighing == Weighing::kCount) {
      return 1;
    }
    if (weighing == Weighing::kRough) {
      return static_cast<uint64_t>(expf((logit - maximum) * static_cast<float>(scale.per_temperature)) * 0x1p44f);
    }
    return token_weight(scale(logit, maximum));
  }

  // Whether what a comparison of a sum with the limit says is true of exact weights too. Where a token weighs anything,
  // z >= -32 is off by 32 * 3 * 2^-24 at most and expf by a few 2^-24, so that a sum is off by less than its 2^-16th.
  __device__ bool is_certain(uint64_t sum, double limit) const {
    const double weight = static_cast<double>(sum);
    return weighing != Weighing::kRough || sum == 0 || fabs(weight - limit) > 0x1p-15 * (weight + limit);
  }
};

}  // namespace taps::cuda
