// Where the rules run. No torch here.
#pragma once

#include <cstdint>

// Marks a rule: an inline function that the CPU loops and the CUDA kernels both call.
#if defined(__CUDACC__)
#define TAPS_HD __host__ __device__
#else
#define TAPS_HD
#endif

namespace taps {

// The grain of at::parallel_for: as many rows as make a task worth waking a thread for, about 20 microseconds.
// `work` is a row's cost in elementary steps of about a nanosecond.
inline int64_t rows_per_task(int64_t work) {
  constexpr int64_t kWorthwhile = 20000;
  return work >= kWorthwhile ? 1 : kWorthwhile / (work > 0 ? work : 1);
}

}  // namespace taps
