// A request's coupling on the device: the noise is computed anew for each node, in registers, where it is used.
#pragma once

#include "common/bounded_noise.cuh"
#include "common/coupling_rule.h"
#include "tree_expansion/expand_frontier.h"
#include "tree_expansion/logits_row.cuh"

namespace taps::cuda {

// The logits of a node by which its children are ranked. kIsCoupled: whether any request of the launch may be coupled;
// is_coupled: whether this one is.
template <LogitsType kType, bool kIsCoupled>
struct NodeLogits {
  Row<kType> row;
  const int64_t* token_ids;  // [V], or null: see ExpandFrontierParams
  Coupling coupling;
  int64_t seed;
  int64_t position;
  bool is_coupled;

  // A full draw of four words for the one of a token that may stand anywhere in the target's vocabulary.
  __device__ __forceinline__ float noise_at(int index) const {
    const int64_t token = token_ids == nullptr ? index : __ldg(token_ids + index);
    return coupling_noise(noise_word(seed, position, static_cast<uint32_t>(token)));
  }

  // From the drafter's logits of indices first, first + 1, ..., where 4 divides `first`.
  template <int kCount>
  __device__ __forceinline__ void couple(int first, float* logits) const {
    if constexpr (kIsCoupled) {
      if (token_ids != nullptr) {
        for (int j = 0; j < kCount; ++j) {
          logits[j] = coupling(logits[j], noise_at(min(first + j, row.vocabulary - 1)));
        }
        return;
      }
#pragma unroll
      for (int j = 0; j < kCount; j += 4) {
        const PhiloxWords words = noise_words(seed, position, static_cast<uint32_t>(first + j) / 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          logits[j + i] = coupling(logits[j + i], coupling_noise(words.word[i]));
        }
      }
    }
  }

  __device__ __forceinline__ float at(int index) const {
    const float own = row.at(index);
    if constexpr (kIsCoupled) {
      return is_coupled ? coupling(own, noise_at(index)) : own;
    }
    return own;
  }
};

template <LogitsType kType, bool kIsCoupled>
__device__ __forceinline__ NodeLogits<kType, kIsCoupled> node_logits(const Row<kType>& row,
                                                                     const ExpandFrontierParams& params, int64_t b) {
  if constexpr (kIsCoupled) {
    const CouplingColumns& columns = params.coupling;
    const float temperature = __ldg(columns.temperature + b);
    return {row,
            params.token_ids,
            coupling_of(temperature, __ldg(columns.alpha + b), __ldg(columns.beta + b)),
            columns.seeds[b],
            columns.positions[b],
            is_coupled(temperature)};
  }
  return {row, nullptr, {}, 0, 0, false};
}

}  // namespace taps::cuda
