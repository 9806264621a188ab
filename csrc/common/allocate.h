// Outputs and workspaces of the ops.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(TAPS_SIMT)
#include "simt/simt.h"
#endif

namespace taps {

// An uninitialised tensor of `like`'s device, and its dtype unless another is given. On the CPU without a trip through
// the dispatcher: at 60 nodes the trips of an op's six tensors cost more than its work.
inline at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like, at::ScalarType dtype) {
  if (like.is_cpu()) {
    at::Tensor tensor = at::detail::empty_cpu(sizes, dtype);
#if defined(TAPS_SIMT)
    simt::poison(tensor.mutable_data_ptr(), tensor.nbytes());  // shows what a kernel forgets to write
#endif
    return tensor;
  }
  return at::empty(sizes, like.options().dtype(dtype));
}

inline at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
  return empty(sizes, like, like.scalar_type());
}

}  // namespace taps
