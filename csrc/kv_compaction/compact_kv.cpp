#include "kv_compaction/compact_kv.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/check.h"
#include "common/run.h"
#include "ops.h"

namespace taps {

namespace {

void check_kv(const Tensor& kv) {
  check_dim(kv, "kv", 5, "[2 * layers, B, heads, capacity, head_dim]");
  TORCH_CHECK_VALUE(kv.is_contiguous(), "kv must be contiguous, since it changes in place, got strides ",
                    text_of(kv.strides()));
}

// int64 [B, N], contiguous. The i-th node of a path is at least i: in-place moves depend on it.
Tensor checked_path(const Tensor& path_in, const Tensor& num_accepted, int64_t room) {
  check_int64(path_in, "path");
  check_dim(path_in, "path", 2, "[B, N]");
  check_sizes(path_in, "path", {num_accepted.size(0), path_in.size(1)}, "one a row of kv");
  const int64_t nodes = path_in.size(1);
  check_values(num_accepted, "num_accepted", -1, nodes - 1);
  const Tensor path = path_in.contiguous();
  const int64_t* row = path.const_data_ptr<int64_t>();
  for (int64_t b = 0; can_read(path) && b < path.size(0); ++b, row += nodes) {
    for (int64_t i = 0; i <= num_accepted.const_data_ptr<int64_t>()[b]; ++i) {
      TORCH_CHECK_VALUE(i <= row[i] && row[i] < nodes, "path must hold nodes in ", i, "..", nodes - 1, " at ", i,
                        ", row ", b, " has ", row[i]);
      TORCH_CHECK_VALUE(row[i] < room, "kv must have capacity for kv_length plus every node of the path, row ", b,
                        " has node ", row[i], " and room for ", room);
    }
  }
  return path;
}

}  // namespace

void compact_kv(const Tensor& kv, const Tensor& path_in, const Tensor& num_accepted_in, const Tensor& prefix_lengths_in,
                int64_t kv_length) {
  check_device(
      {{"kv", kv}, {"path", path_in}, {"num_accepted", num_accepted_in}, {"prefix_lengths", prefix_lengths_in}});
  check_kv(kv);
  check_int64(num_accepted_in, "num_accepted");
  check_sizes(num_accepted_in, "num_accepted", {kv.size(1)}, "one a row of kv");
  const Tensor num_accepted = num_accepted_in.contiguous();
  const Tensor prefix_lengths = checked_prefix_lengths(prefix_lengths_in, kv.size(1), kv_length);
  const Tensor path = checked_path(path_in, num_accepted, std::max<int64_t>(0, kv.size(3) - kv_length));
  if (kv.numel() == 0) {
    return;
  }

  const CompactKvParams params{
      .kv = static_cast<char*>(kv.mutable_data_ptr()),
      .path = path.const_data_ptr<int64_t>(),
      .num_accepted = num_accepted.const_data_ptr<int64_t>(),
      .prefix_lengths = prefix_lengths.const_data_ptr<int64_t>(),
      .nodes = path.size(1),
      .rows = kv.size(1),
      .heads = kv.size(2),
      .capacity = kv.size(3),
      .kv_length = kv_length,
      .row_bytes = kv.size(4) * static_cast<int64_t>(kv.element_size()),
  };
  const int64_t slabs = kv.size(0) * params.rows * params.heads;
  run(
      kv, [&](Stream stream) { cuda::compact_kv(params, slabs, stream); },
      [&] {
        at::parallel_for(0, slabs, rows_per_task(20 + params.row_bytes),
                         [&](int64_t begin, int64_t end) { cpu::compact_kv(params, begin, end); });
      });
}

}  // namespace taps
