// Where an op runs: its loop over rows on the CPU, or its kernel on the tensors' device and current stream. In the
// module of the host stand-in (TAPS_SIMT, python_tests/simt) the kernels run on CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/device.h"

#if defined(TAPS_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace taps {

#if defined(TAPS_SIMT)
constexpr bool kIsStandIn = true;
#else
constexpr bool kIsStandIn = false;
#endif

// Whether the host can read the values of a tensor now. On a device it would have to wait for all earlier work.
inline bool can_read(const at::Tensor& tensor) {
  return tensor.is_cpu() && !kIsStandIn;
}

// Calls loop(), or launch(stream), for an op on `tensor` and others of its device.
template <typename Launch, typename Loop>
void run([[maybe_unused]] const at::Tensor& tensor, [[maybe_unused]] Launch launch, [[maybe_unused]] Loop loop) {
#if defined(TAPS_SIMT)
  launch(nullptr);
#else
#if defined(TAPS_WITH_CUDA)
  if (tensor.is_cuda()) {
    const c10::cuda::CUDAGuard guard(tensor.device());
    launch(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream());
    return;
  }
#endif
  loop();
#endif
}

}  // namespace taps
