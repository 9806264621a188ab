// In the place of CUDA's header of this name, for the host stand-in: see simt/simt.h. Only what the kernels use.
#pragma once

#include <math.h>  // this one has isnan and its like in the global namespace

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simt/device_functions.h"
#include "simt/machine.h"
#include "simt/simt.h"
#include "simt/vector_types.h"

// ---- Keywords and builtins ----

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

inline const uint3& threadIdx = simt::detail::thread_index;
inline const uint3& blockIdx = simt::detail::block_index;
inline const dim3& blockDim = simt::detail::block_extent;
inline const dim3& gridDim = simt::detail::grid_extent;
constexpr int warpSize = 32;

// ---- What common/launch.cuh leaves to this header ----

#define TAPS_SHARED(type, name, count)                                                   \
  static ::simt::detail::Site name##_site{#name, sizeof(type) * (count), alignof(type)}; \
  type(&name)[count] = *static_cast<type(*)[count]>(::simt::detail::shared_memory(name##_site))

#define TAPS_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::simt::detail::dynamic_shared_memory())

#define TAPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::detail::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

// ---- The runtime's functions ----

using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

namespace simt::detail {
cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes);
}

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return simt::detail::set_dynamic_shared_limit(reinterpret_cast<const void*>(kernel), value);
}
