// Launches and shared arrays, the two things that a kernel file cannot spell the same way for nvcc and for the host
// stand-in (python_tests/simt, whose cuda_runtime.h brings its own); and what a launch needs to know of its device.
#pragma once

#include <cuda_runtime.h>

#if defined(__CUDACC__)

#include <stdexcept>
#include <string>

// TAPS_SHARED(float, sums, kWarps): an array of the block. Uninitialised; as long as the block lives.
#define TAPS_SHARED(type, name, count) __shared__ type name[count]

// TAPS_DYNAMIC_SHARED(uint32_t, table): a pointer to the dynamic bytes of the launch, aligned to 16.
#define TAPS_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char taps_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(taps_dynamic_shared)

// TAPS_LAUNCH((kernel<kThreads>), grid, block, dynamic_shared_bytes, stream, arguments...): asynchronous; throws what
// the launch itself reports.
#define TAPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                               \
  do {                                                                                                            \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);                                           \
    const cudaError_t taps_error = cudaGetLastError();                                                            \
    if (taps_error != cudaSuccess) {                                                                              \
      throw std::runtime_error(std::string(#kernel " could not be launched: ") + cudaGetErrorString(taps_error)); \
    }                                                                                                             \
  } while (false)

#endif

namespace taps::cuda {

// The multiprocessors of the current device, at least 1.
inline int num_multiprocessors() {
  int device = 0;
  int count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace taps::cuda
