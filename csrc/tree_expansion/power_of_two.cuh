// The one instruction that nvcc has no function for.
#pragma once

#include "common/launch.cuh"

namespace taps::cuda {

// 2^y for -126 <= y <= 0, to two units in the last place. exp2f is the same instruction between three others, which
// take care of results below the normal numbers.
__device__ __forceinline__ float power_of_two(float y) {
#if defined(__CUDACC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
#else
  return exp2f(y);
#endif
}

}  // namespace taps::cuda
