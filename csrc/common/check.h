// The checks of the ops: one sentence each (name, expectation, fact), a ValueError in Python, before any work. Values
// are checked where they can be read (run.h); on a device the kernels stay within their tensors whatever they are
// given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "common/run.h"
#include "common/tree_rules.h"

namespace taps {

// "[2, 60]"
inline std::string text_of(at::IntArrayRef sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

// "int64", "float32": the first of torch's two names of a dtype.
inline std::string text_of(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};

// The tensors of a call: dense, on one device, and one that this build has ops for.
inline void check_device(std::initializer_list<NamedTensor> tensors) {
  const auto& [first_name, first] = *tensors.begin();
#if !defined(TAPS_WITH_CUDA)
  TORCH_CHECK_VALUE(!first.is_cuda(), first_name, " must be a CPU tensor, got ", first.device().str(),
                    ": this taps_ext was built without CUDA ops (taps-ext info says why)");
#endif
  TORCH_CHECK_VALUE(first.is_cpu() || first.is_cuda(), first_name, " must be a CPU or CUDA tensor, got ",
                    first.device().str());
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(tensor.device() == first.device(), name, " must be on ", first.device().str(), ", like ",
                      first_name, ", got ", tensor.device().str());
    TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " must be a dense tensor, got ", tensor.layout());
  }
}

inline void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", text_of(dtype), ", got ",
                    text_of(tensor.scalar_type()));
}

inline void check_int64(const at::Tensor& tensor, const char* name) {
  check_dtype(tensor, name, at::kLong);
}

inline void check_float32(const at::Tensor& tensor, const char* name) {
  check_dtype(tensor, name, at::kFloat);
}

inline void check_floating(const at::Tensor& tensor, const char* name) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                    " must be float32, bfloat16 or float16, got ", text_of(dtype));
}

// `dims` names the axes: "[B, N, V]".
inline void check_dim(const at::Tensor& tensor, const char* name, int64_t dim, const char* dims) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must be ", dims, ", got ", text_of(tensor.sizes()));
}

// `like` says where the sizes come from: "like parents", "one a row".
inline void check_sizes(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const char* like) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", text_of(sizes), " (", like, "), got ",
                    text_of(tensor.sizes()));
}

// int64 [B], each value in lowest..highest. Takes any stride.
inline void check_values(const at::Tensor& tensor, const char* name, int64_t lowest, int64_t highest) {
  if (!can_read(tensor)) {
    return;
  }
  const int64_t stride = tensor.stride(0);
  const int64_t* values = tensor.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < tensor.size(0); ++b) {
    const int64_t value = values[b * stride];
    TORCH_CHECK_VALUE(lowest <= value && value <= highest, name, " must lie in ", lowest, "..", highest, ", row ", b,
                      " has ", value);
  }
}

// One value per row, contiguous.
inline at::Tensor checked_column(const at::Tensor& tensor, const char* name, at::ScalarType dtype, int64_t rows) {
  check_dtype(tensor, name, dtype);
  check_sizes(tensor, name, {rows}, "one a row");
  return tensor.contiguous();
}

// The same, each value allowed by `is_allowed`; `expected` says in words which are.
template <typename Value>
at::Tensor checked_column(const at::Tensor& tensor, const char* name, int64_t rows, const char* expected,
                          bool (*is_allowed)(Value)) {
  at::Tensor column = checked_column(tensor, name, c10::CppTypeToScalarType<Value>::value, rows);
  const Value* values = column.const_data_ptr<Value>();
  for (int64_t b = 0; can_read(tensor) && b < rows; ++b) {
    TORCH_CHECK_VALUE(is_allowed(values[b]), name, " must be ", expected, ", row ", b, " has ", values[b]);
  }
  return column;
}

inline at::Tensor checked_temperature(const at::Tensor& temperature, int64_t rows) {
  const auto is_allowed = [](float value) { return std::isfinite(value) && value >= 0; };
  return checked_column<float>(temperature, "temperature", rows, "finite and at least 0", is_allowed);
}

inline at::Tensor checked_positions(const at::Tensor& positions, int64_t rows) {
  const auto is_allowed = [](int64_t value) { return 0 <= value && value <= int64_t{1} << 62; };  // room for a depth
  return checked_column<int64_t>(positions, "positions", rows, "between 0 and 2^62", is_allowed);
}

// Where the r-th tree of a batch stands: "row 3", or with several trees a row "row 1, tree 1".
inline std::string place_of(int64_t r, const at::Tensor& num_nodes) {
  if (num_nodes.dim() < 2) {
    return "row " + std::to_string(r);
  }
  return "row " + std::to_string(r / num_nodes.size(1)) + ", tree " + std::to_string(r % num_nodes.size(1));
}

// A parent array that holds what it must: int64 [..., N] and num_nodes [...], both contiguous.
inline void check_parents(const at::Tensor& parents, const at::Tensor& num_nodes) {
  const int64_t nodes = parents.size(-1);
  TORCH_CHECK_VALUE(nodes >= 1, "parents must hold at least the root, got ", text_of(parents.sizes()));
  if (!can_read(parents)) {
    return;
  }
  const int64_t* counts = num_nodes.const_data_ptr<int64_t>();
  const int64_t* row = parents.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < num_nodes.numel(); ++r, row += nodes) {
    TORCH_CHECK_VALUE(1 <= counts[r] && counts[r] <= nodes, "num_nodes must lie in 1..", nodes, ", ",
                      place_of(r, num_nodes), " has ", counts[r]);
    TORCH_CHECK_VALUE(row[0] == -1, "node 0 must be the root with parent -1, ", place_of(r, num_nodes), " has parent ",
                      row[0]);
    const int64_t bad = first_bad_parent(row, counts[r]);
    TORCH_CHECK_VALUE(bad < 0, "parents must come before their children: ", place_of(r, num_nodes), ", node ", bad,
                      " has parent ", row[bad]);
  }
}

// The parent array that an op takes first, checked and contiguous: parents [B, N] and num_nodes [B], or as `dims` says.
inline std::pair<at::Tensor, at::Tensor> checked_tree(const at::Tensor& parents, const at::Tensor& num_nodes,
                                                      int64_t dim = 2, const char* dims = "[B, N]") {
  check_int64(parents, "parents");
  check_int64(num_nodes, "num_nodes");
  check_dim(parents, "parents", dim, dims);
  check_sizes(num_nodes, "num_nodes", parents.sizes().slice(0, dim - 1), "one a tree");
  std::pair<at::Tensor, at::Tensor> tree(parents.contiguous(), num_nodes.contiguous());
  check_parents(tree.first, tree.second);
  return tree;
}

// A tensor with one value per node, contiguous.
inline at::Tensor checked_like(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                               const at::Tensor& parents) {
  check_dtype(tensor, name, dtype);
  check_sizes(tensor, name, parents.sizes(), "like parents");
  return tensor.contiguous();
}

// int64 [B], contiguous, each in 0..kv_length.
inline at::Tensor checked_prefix_lengths(const at::Tensor& prefix_lengths, int64_t rows, int64_t kv_length) {
  check_int64(prefix_lengths, "prefix_lengths");
  check_sizes(prefix_lengths, "prefix_lengths", {rows}, "one a row");
  TORCH_CHECK_VALUE(kv_length >= 0, "kv_length must be at least 0, got ", kv_length);
  check_values(prefix_lengths, "prefix_lengths", 0, kv_length);
  return prefix_lengths.contiguous();
}

// Contiguous tokens int64 [rows, N]; only the first num_nodes of a row count. `num_tokens` is V, or -1 where unknown.
inline void check_tokens(const at::Tensor& tokens, const at::Tensor& num_nodes, int64_t num_tokens = -1) {
  if (!can_read(tokens)) {
    return;
  }
  const int64_t nodes = tokens.size(-1);
  const int64_t* counts = num_nodes.const_data_ptr<int64_t>();
  const int64_t* row = tokens.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < num_nodes.numel(); ++r, row += nodes) {
    const int64_t bad = first_bad_token(row, counts[r], num_tokens < 0 ? INT64_MAX : num_tokens);
    if (bad < 0) {
      continue;
    }
    TORCH_CHECK_VALUE(num_tokens >= 0, "tokens must not be negative, ", place_of(r, num_nodes), ", node ", bad, " has ",
                      row[bad]);
    TORCH_CHECK_VALUE(false, "tokens must lie in the vocabulary 0..", num_tokens - 1, ", ", place_of(r, num_nodes),
                      ", node ", bad, " has ", row[bad]);
  }
}

}  // namespace taps
