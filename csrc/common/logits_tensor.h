// Checks of a tensor of logits, and its dtype in the terms of common/logits_type.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/check.h"
#include "common/logits_type.h"

namespace taps {

// Three axes, as `dims` names them, the last one the vocabulary: contiguous, and with at least one token.
inline void check_logits(const at::Tensor& logits, const char* dims) {
  check_floating(logits, "logits");
  check_dim(logits, "logits", 3, dims);
  TORCH_CHECK_VALUE(logits.size(2) >= 1, "logits must be over at least one token, got ", text_of(logits.sizes()));
  TORCH_CHECK_VALUE(logits.stride(2) == 1 || logits.size(2) == 1, "logits must have stride 1 in the vocabulary, got ",
                    logits.stride(2), ": make it contiguous");
}

inline LogitsType logits_type_of(const at::Tensor& logits) {
  return logits.scalar_type() == at::kFloat      ? LogitsType::kFloat32
         : logits.scalar_type() == at::kBFloat16 ? LogitsType::kBFloat16
                                                 : LogitsType::kFloat16;
}

}  // namespace taps
