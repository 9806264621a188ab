// Where the rules run. No torch here.
#pragma once

#include <cstdint>

// Marks a rule: an inline function that the CPU loops and the CUDA kernels both call. TAPS_INLINE marks
// those that are called by a loop compiled for several instruction sets: only inlined code is compiled for each of
// them.
#if defined(__CUDACC__)
#define TAPS_HD __host__ __device__
#define TAPS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TAPS_HD
#define TAPS_INLINE inline __attribute__((always_inline))
#else
#define TAPS_HD
#define TAPS_INLINE inline
#endif

struct CUstream_st;  // CUDA's name for the struct behind a cudaStream_t

namespace taps {

using Stream = CUstream_st*;

// The grain of at::parallel_for: as many rows as make a task of about 20 microseconds, worth waking a thread for.
// `work` is a row's cost in elementary steps of about a nanosecond.
inline int64_t rows_per_task(int64_t work) {
  constexpr int64_t kWorthwhile = 20000;
  return work >= kWorthwhile ? 1 : kWorthwhile / (work > 0 ? work : 1);
}

}  // namespace taps
