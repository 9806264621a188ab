// The best children of the frontier nodes, and the best of those: what is read and what is written.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/logits_type.h"

namespace taps {

// Of each request, as common/coupling_rule.h has them; all null where no request is coupled.
struct CouplingColumns {
  const int64_t* seeds;      // [B]
  const int64_t* positions;  // [B], the position of the children
  const float* temperature;  // [B]
  const float* alpha;        // [B]
  const float* beta;         // [B]
};

struct ExpandFrontierParams {
  const void* logits;  // [B, F, V]
  LogitsType logits_type;
  int64_t batch_stride;  // in elements
  int64_t frontier_stride;
  int64_t frontier_length;     // F
  int64_t vocabulary;          // V
  int64_t branching;           // K
  const float* parent_scores;  // [B, F]
  const int64_t* token_ids;    // [V], ascending, the token of each logit; null: its index
  CouplingColumns coupling;

  TAPS_HD int64_t token_of(int64_t index) const { return token_ids == nullptr ? index : token_ids[index]; }

  int64_t* tokens;     // [B, F, K]
  float* scores;       // [B, F, K]
  int64_t* frontier;   // [B, K]
  float* entropies;    // [B, F]
  float* noise;        // on the CPU, where coupled: [B, whole blocks of V], shared by a request's nodes
  int64_t* workspace;  // on a device [expansion_workspace_length(B, F, V, K)]
  uint64_t nonce;      // on a device launch_nonce()
};

// The limits of the kernel. The loop on the CPU has none.
constexpr int64_t kMostBranching = 256;
constexpr int64_t kMostFrontierNodes = 65535;
constexpr int64_t kMostVocabulary = int64_t{1} << 27;

// A row is cut into tiles in the same way whatever the batch and the device: sums have one order.
struct ExpansionTiles {
  int threads;    // that share a tile
  int num_tiles;  // of a row
};

constexpr int kTokensPerThread = 32;

constexpr ExpansionTiles expansion_tiles(int64_t vocabulary) {
  const int threads = vocabulary <= 32 * kTokensPerThread ? 32 : 128;
  const int64_t tile_length = int64_t{threads} * kTokensPerThread;
  return {threads, static_cast<int>((vocabulary + tile_length - 1) / tile_length)};
}

// In int64. Per row: the best K keys of each tile, its three statistics, a ticket. Then one ticket per request.
struct ExpansionWorkspace {
  int64_t statistics;
  int64_t ticket;
  int64_t row_length;

  TAPS_HD constexpr ExpansionWorkspace(int num_tiles, int64_t branching)
      : statistics(num_tiles * branching), ticket(statistics + 3 * num_tiles), row_length(ticket + 1) {}
};

constexpr int64_t expansion_workspace_length(int64_t batch, int64_t frontier_length, int64_t vocabulary,
                                             int64_t branching) {
  const ExpansionWorkspace layout(expansion_tiles(vocabulary).num_tiles, branching);
  return batch * frontier_length * layout.row_length + batch;
}

namespace cpu {

// The noise of blocks begin..end of B * num_blocks(V), except for requests that are not coupled.
void write_noise(const ExpandFrontierParams& params, int64_t begin, int64_t end);

// The children and the entropies of frontier nodes begin..end of B * F.
void expand_nodes(const ExpandFrontierParams& params, int64_t begin, int64_t end);

// The next frontier of batch rows begin..end, once their nodes are expanded.
void choose_frontier(const ExpandFrontierParams& params, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {
void expand_frontier(const ExpandFrontierParams& params, int64_t batch, Stream stream);
}  // namespace cuda

}  // namespace taps
