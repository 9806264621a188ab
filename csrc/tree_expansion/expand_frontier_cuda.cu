#include "tree_expansion/expand_frontier.h"

#include <algorithm>

#include "common/launch.cuh"
#include "common/tree_rules.h"
#include "tree_expansion/coupled_logits.cuh"
#include "tree_expansion/logits_row.cuh"
#include "tree_expansion/power_of_two.cuh"
#include "tree_expansion/top_keys.cuh"

namespace taps::cuda {

namespace {

struct TileStatistics {
  double maximum;
  double sum;       // of exp(x - maximum)
  double weighted;  // of exp(x - maximum) * (x - maximum)
};

// ---- Keys ----

// What ranks a token, a chunk of tokens (its best logit, its first token), a child (its score, its index).
__device__ __forceinline__ uint64_t key_of(float logit, int token) {
  return static_cast<uint64_t>(standing_of(logit)) << 32 | static_cast<uint32_t>(token);
}

// ---- One tile ----

constexpr float kLog2OfE = 1.44269504f;
constexpr double kLogOf2 = 0.693147180559945309;
constexpr float kLeastExponent = -87;  // exp of it, 1e-38, adds nothing to a sum of at least 1

// A thread's sums, in float32: few tokens. In powers of 2, y = (x - maximum) / log 2.
template <int kCount>
__device__ __forceinline__ float2 sum_powers(const float* logits, float maximum) {
  float2 sums = make_float2(0, 0);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float y = fmaxf(logits[j] - maximum, kLeastExponent) * kLog2OfE;  // NaN and -inf become the least
    const float power = power_of_two(y);
    sums.x += power;
    sums.y = fmaf(power, y, sums.y);
  }
  return sums;
}

// Called by the last warp of the block while the others rank.
template <int kThreads>
__device__ __forceinline__ void write_statistics(const float2* sums, float maximum, TileStatistics* statistics) {
  if (warp_index() != kThreads / kWarp - 1) {
    return;
  }
  double sum = 0;
  double weighted = 0;
  for (int i = lane_index(); i < kThreads; i += kWarp) {
    sum += sums[i].x;
    weighted += sums[i].y;
  }
  const auto add = [](double a, double b) { return a + b; };
  sum = warp_reduce(sum, add);
  weighted = warp_reduce(weighted, add);
  if (lane_index() == 0) {
    *statistics = {maximum, sum, weighted * kLogOf2};
  }
}

// The tokens of a chunk whose logits are at least `least`. NaN is taken along, as the -inf for which it stands.
template <int kPerChunk>
__device__ __forceinline__ void collect_chunk(const float* logits, float least, int first, int vocabulary,
                                              TopKeys& top) {
  unsigned hits = 0;
#pragma unroll
  for (int j = 0; j < kPerChunk; ++j) {
    hits |= !(logits[j] < least) ? 1u << j : 0u;
  }
  hits &= (1u << max(0, min(kPerChunk, vocabulary - first))) - 1;
  int slot = atomicAdd(&top.count, __popc(hits));
#pragma unroll
  for (int j = 0; j < kPerChunk; ++j) {
    if ((hits >> j & 1) != 0) {
      put(top, slot++, key_of(logits[j], first + j));
    }
  }
}

// A thread holds 32 tokens, in chunks that it loads at once. The chunks of a group's threads lie 32 chunks apart, so
// that equal logits in a row do not meet in one group; a warp still loads whole lines.
template <int kThreads, LogitsType kType, bool kIsCoupled, typename Meanwhile>
__device__ void expand_tile(const NodeLogits<kType, kIsCoupled>& node, bool is_aligned, int tile, int k, TopKeys& top,
                            uint64_t* keys, TileStatistics* statistics, Meanwhile meanwhile) {
  constexpr int kPerChunk = Row<kType>::kPerChunk;
  constexpr int kChunks = kTokensPerThread / kPerChunk;
  const Row<kType>& row = node.row;
  TAPS_SHARED(unsigned, best_of_warp, kThreads / kWarp);
  TAPS_SHARED(float2, sums, kThreads);
  const int begin = tile * kThreads * kTokensPerThread;
  const int place = lane_index() / kGroupsPerWarp<kThreads> * kGroups + group_index<kThreads>();
  const auto first_of = [&](int chunk) { return begin + (chunk * kThreads + place) * kPerChunk; };

  uint4 chunks[kChunks];
  if (is_aligned) {
    load_chunks<kType, kChunks>(row, first_of, chunks);
  } else {
    load_unaligned<kThreads, kType, kChunks>(row, begin, first_of, chunks);
  }
  meanwhile();
  float logits[kChunks][kPerChunk];
  float largest[kChunks];
  float best_logit = -kInfinity;
  int best_first = first_of(0);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    Row<kType>::unpack(chunks[c], logits[c]);
    if (node.is_coupled) {
      node.template couple<kPerChunk>(first_of(c), logits[c]);
    }
    largest[c] = -kInfinity;
#pragma unroll
    for (int j = 0; j < kPerChunk; ++j) {
      largest[c] = fmaxf(largest[c], logits[c][j]);  // never NaN
    }
    if (largest[c] > best_logit) {
      best_logit = largest[c];
      best_first = first_of(c);
    }
  }
  const uint64_t best = best_first < row.vocabulary ? key_of(best_logit, best_first) : kNoKey;
  const unsigned best_standing = __reduce_min_sync(kAllLanes, static_cast<unsigned>(best >> 32));
  if (lane_index() == 0) {
    best_of_warp[warp_index()] = best_standing;
  }
  offer_best<kThreads>(top, best);
  __syncthreads();

  find_bound<kThreads>(top, k);
  unsigned standing = best_of_warp[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) {
    standing = min(standing, best_of_warp[warp]);
  }
  const float maximum = score_of(standing);
  float2 own = make_float2(0, 0);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const float2 more = sum_powers<kPerChunk>(logits[c], maximum);
    own = make_float2(own.x + more.x, own.y + more.y);
  }
  sums[threadIdx.x] = own;
  __syncthreads();

  const float least = score_of(static_cast<uint32_t>(top.bound >> 32));
  const uint32_t last = static_cast<uint32_t>(top.bound);  // the chunk up to which logits of `least` count
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (largest[c] > least || (largest[c] == least && static_cast<uint32_t>(first_of(c)) <= last)) {
      collect_chunk<kPerChunk>(logits[c], least, first_of(c), row.vocabulary, top);
    }
  }
  write_statistics<kThreads>(sums, maximum, statistics);
  __syncthreads();

  const int count = min(kThreads * kTokensPerThread, row.vocabulary - begin);
  const auto key = [&](int i) { return key_of(node.at(begin + i), begin + i); };
  visit_collected<kThreads>(top, count, k, key, [&](int rank, uint64_t found) { keys[rank] = found; });
  for (int i = top.count + static_cast<int>(threadIdx.x); i < k; i += kThreads) {
    keys[i] = kNoKey;  // a tile of fewer tokens
  }
}

// ---- One row ----

// Every warp does this for itself: no barrier, and one order of the sums. `own` is the tile of the thread's lane.
__device__ __forceinline__ TileStatistics combine(const TileStatistics& own, const TileStatistics* tiles,
                                                  int num_tiles) {
  TileStatistics row{own.maximum, 0, 0};
  for (int i = lane_index() + kWarp; i < num_tiles; i += kWarp) {
    row.maximum = fmax(row.maximum, tiles[i].maximum);
  }
  row.maximum = warp_reduce(row.maximum, [](double a, double b) { return fmax(a, b); });
  for (int i = lane_index(); i < num_tiles; i += kWarp) {
    const TileStatistics tile = i < kWarp ? own : tiles[i];
    if (tile.maximum > -static_cast<double>(kInfinity)) {
      const double step = tile.maximum - row.maximum;
      const double scale = exp(step);
      row.sum += scale * tile.sum;
      row.weighted += scale * (tile.weighted + step * tile.sum);
    }
  }
  const auto add = [](double a, double b) { return a + b; };
  row.sum = warp_reduce(row.sum, add);
  row.weighted = warp_reduce(row.weighted, add);
  return row;
}

template <int kThreads>
__device__ void finish_row(const ExpandFrontierParams& p, int64_t row, int num_tiles, TopKeys& top,
                           const uint64_t* keys, const TileStatistics* tiles) {
  constexpr double kNone = -static_cast<double>(kInfinity);
  const int k = static_cast<int>(p.branching);
  const float parent = p.parent_scores[row] > -kInfinity ? p.parent_scores[row] : -kInfinity;  // NaN: no such node
  // Loaded here, so that they arrive together with the keys.
  const TileStatistics own = lane_index() < num_tiles ? tiles[lane_index()] : TileStatistics{kNone, 0, 0};
  TileStatistics statistics;
  double log_sum;
  const auto normalise = [&] {
    statistics = combine(own, tiles, num_tiles);
    log_sum = log(statistics.sum);
  };
  const auto is_valid = [&] { return fabs(statistics.maximum) < -kNone; };
  const auto write = [&](int rank, uint64_t key) {
    const double z = static_cast<double>(score_of(static_cast<uint32_t>(key >> 32))) - statistics.maximum;
    const double log_probability = is_valid() ? fmin(0.0, z - log_sum) : kNone;
    p.tokens[row * k + rank] = p.token_of(static_cast<uint32_t>(key));
    p.scores[row * k + rank] = static_cast<float>(static_cast<double>(parent) + log_probability);
    if (p.frontier_length == 1) {
      p.frontier[row * k + rank] = rank;  // scores fall with the rank
    }
  };
  visit_top_keys<kThreads>(top, num_tiles * k, k, [&](int i) { return keys[i]; }, normalise, write);
  if (threadIdx.x == 0) {
    const double entropy = fmax(0.0, log_sum - statistics.weighted / statistics.sum);
    p.entropies[row] = is_valid() ? static_cast<float>(entropy) : 0.0f;
  }
}

template <int kThreads>
__device__ void choose_frontier(const ExpandFrontierParams& p, int64_t b, TopKeys& top) {
  const int k = static_cast<int>(p.branching);
  const int width = static_cast<int>(p.frontier_length) * k;
  const float* scores = p.scores + b * width;
  visit_top_keys<kThreads>(
      top, width, k, [&](int i) { return key_of(scores[i], i); }, [] {},
      [&](int rank, uint64_t key) { p.frontier[b * k + rank] = static_cast<uint32_t>(key); });
}

// ---- The kernel ----

template <LogitsType kType>
__device__ Row<kType> row_at(const ExpandFrontierParams& p, int64_t b, int64_t node) {
  const auto* logits = static_cast<const typename Row<kType>::Element*>(p.logits);
  return {logits + b * p.batch_stride + node * p.frontier_stride, static_cast<int>(p.vocabulary)};
}

// Blocks per multiprocessor: as many as leave enough registers to avoid spills.
template <int kThreads, LogitsType kType, bool kIsCoupled>
constexpr int kResidentBlocks = kThreads == 32                  ? 16
                                : kType == LogitsType::kFloat32 ? (kIsCoupled ? 5 : 7)
                                                                : (kIsCoupled ? 6 : 8);

// `blocks` blocks per row, each on its share of the tiles: rows are few. The last of them to finish combines the tiles,
// and the one that finishes a request's last row chooses the frontier.
template <int kThreads, LogitsType kType, bool kIsCoupled>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kThreads, kType, kIsCoupled>)
    expand_frontier_kernel(const ExpandFrontierParams p, int num_tiles, int blocks, bool is_aligned) {
  TAPS_SHARED(TopKeys, top, 1);
  const ExpansionWorkspace layout(num_tiles, p.branching);
  const unsigned index = blockIdx.x / static_cast<unsigned>(blocks);  // in 32 bits: a division of 64 takes long
  const unsigned b = index / static_cast<unsigned>(p.frontier_length);
  int64_t* workspace = p.workspace + index * layout.row_length;
  int64_t* request_tickets = p.workspace + gridDim.x / static_cast<unsigned>(blocks) * layout.row_length;
  auto* keys = reinterpret_cast<uint64_t*>(workspace);
  auto* statistics = reinterpret_cast<TileStatistics*>(workspace + layout.statistics);
  auto* row_ticket = reinterpret_cast<unsigned long long*>(workspace + layout.ticket);
  auto* request_ticket = reinterpret_cast<unsigned long long*>(request_tickets) + b;
  const auto node =
      node_logits<kType, kIsCoupled>(row_at<kType>(p, b, index - b * static_cast<unsigned>(p.frontier_length)), p, b);

  const int own = static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks));
  for (int tile = own; tile < num_tiles; tile += blocks) {
    const auto ready_tickets = [&] {
      if (threadIdx.x == 0 && tile == own && blocks > 1) {
        ready_ticket(row_ticket, p.nonce);
      }
      if (threadIdx.x == kThreads - 1 && tile == 0 && p.frontier_length > 1) {
        ready_ticket(request_ticket, p.nonce);
      }
    };
    expand_tile<kThreads>(node, is_aligned, tile, static_cast<int>(p.branching), top[0], keys + tile * p.branching,
                          statistics + tile, ready_tickets);
    __syncthreads();
  }
  if (blocks > 1 && !arrives_last(row_ticket, p.nonce, blocks, true)) {
    return;
  }
  finish_row<kThreads>(p, index, num_tiles, top[0], keys, statistics);
  if (p.frontier_length == 1 || !arrives_last(request_ticket, p.nonce, static_cast<int>(p.frontier_length), true)) {
    return;
  }
  choose_frontier<kThreads>(p, b, top[0]);
}

// ---- The launch ----

// Whether every row can be loaded by chunks of 16 bytes.
template <LogitsType kType>
bool is_aligned(const ExpandFrontierParams& params, int64_t rows) {
  constexpr int64_t kChunk = Row<kType>::kPerChunk;
  const bool are_requests = rows == params.frontier_length || params.batch_stride % kChunk == 0;
  const bool are_nodes = params.frontier_length == 1 || params.frontier_stride % kChunk == 0;
  return are_requests && are_nodes && params.vocabulary % kChunk == 0 &&
         reinterpret_cast<uintptr_t>(params.logits) % 16 == 0;
}

template <int kThreads, LogitsType kType>
void launch(const ExpandFrontierParams& params, int64_t rows, int num_tiles, Stream stream) {
  const int64_t wanted = int64_t{64} * num_multiprocessors();  // eight times what fits at a time
  const int64_t tiles_per_block = std::max<int64_t>(1, std::min<int64_t>(rows * num_tiles / wanted, num_tiles));
  const int blocks = static_cast<int>((num_tiles + tiles_per_block - 1) / tiles_per_block);
  const bool aligned = is_aligned<kType>(params, rows);
  const size_t staged_bytes = aligned ? 0 : kThreads * kTokensPerThread * sizeof(typename Row<kType>::Element);
  const auto grid = static_cast<unsigned>(rows * blocks);
  if (params.coupling.seeds != nullptr) {
    TAPS_LAUNCH((expand_frontier_kernel<kThreads, kType, true>), grid, kThreads, staged_bytes, stream, params,
                num_tiles, blocks, aligned);
  } else {
    TAPS_LAUNCH((expand_frontier_kernel<kThreads, kType, false>), grid, kThreads, staged_bytes, stream, params,
                num_tiles, blocks, aligned);
  }
}

template <LogitsType kType>
void launch_for(const ExpandFrontierParams& params, int64_t rows, Stream stream) {
  const ExpansionTiles tiles = expansion_tiles(params.vocabulary);
  if (tiles.threads == 32) {
    return launch<32, kType>(params, rows, tiles.num_tiles, stream);
  }
  launch<128, kType>(params, rows, tiles.num_tiles, stream);
}

}  // namespace

void expand_frontier(const ExpandFrontierParams& params, int64_t batch, Stream stream) {
  const int64_t rows = batch * params.frontier_length;
  if (rows == 0) {
    return;
  }
  switch (params.logits_type) {
    case LogitsType::kFloat32:
      return launch_for<LogitsType::kFloat32>(params, rows, stream);
    case LogitsType::kBFloat16:
      return launch_for<LogitsType::kBFloat16>(params, rows, stream);
    case LogitsType::kFloat16:
      return launch_for<LogitsType::kFloat16>(params, rows, stream);
  }
}

}  // namespace taps::cuda
