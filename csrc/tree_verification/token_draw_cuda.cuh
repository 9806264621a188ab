// One draw from one row of logits by a block of threads: common/sampling_rule.h, without sorting the vocabulary. A
// first reading finds the maximum of every chunk; after it a chunk is looked at only if one of its tokens could win.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/bounded_noise.cuh"
#include "common/sampling_rule.h"
#include "tree_verification/logits_chunks.cuh"
#include "tree_verification/row_scan.cuh"
#include "tree_verification/token_filter.cuh"

namespace taps::cuda {

// The settings of one request. What takes a division or a logarithm is computed once, where it takes no registers.
struct DrawSettings {
  LogitScale scale;
  float scale_of_bound;
  bool is_greedy;
  double least_z;  // of min-p
  int64_t top_k;
  double top_p;
  int64_t seed;
  int64_t root_position;

  __device__ bool has_filter(int64_t vocabulary) const {
    return !is_greedy && ((0 < top_k && top_k < vocabulary) || top_p < 1 || least_z > -static_cast<double>(kInfinity));
  }
};

// The values are unchecked, as all values on a device: draws are greedy except at a finite temperature above 0.
__device__ inline DrawSettings draw_settings(double temperature, int64_t top_k, double top_p, double min_p,
                                             int64_t seed, int64_t root_position) {
  return {{temperature, 1 / temperature},
          scale_of_bound(temperature),
          !(temperature > 0 && temperature <= FLT_MAX),
          min_p > 0 ? log(min_p) : -static_cast<double>(kInfinity),
          top_k,
          top_p,
          seed,
          root_position};
}

// What to draw from: chunks first..end-1 of a row, all of them where there is a filter, `depth` positions behind the
// root's.
template <LogitsType kType>
struct DrawTask {
  ChunkedRow<kType> row;
  int first, end;
  int64_t depth;
};

// The part of a row in the draw, chunks first..end-1, and the maximum from which z is measured.
template <LogitsType kType>
struct Contest {
  ChunkedRow<kType> row;
  int first, end;
  const uint32_t* chunk_best;  // indexed from chunk 0
  const DrawSettings& settings;
  float maximum;
  int likeliest;       // a token of the maximum
  uint32_t last_kept;  // standing
  int64_t seed;
  int64_t position;
};

// Every value below `value` loses, by more than kNoiseSlack; the block shares it as a standing.
struct Needed {
  float value;
  uint32_t* shared;  // [1]

  __device__ void raise(float floor) {
    if (floor > value) {
      value = floor;
      atomicMin(shared, standing_of(floor));
    }
  }

  __device__ void refresh() { value = fmaxf(value, score_of(*const_cast<volatile uint32_t*>(shared))); }
};

struct Candidate {
  int token = -1;
  uint32_t word = 0;
  double z = 0;
  float bound = 0;  // of z + gumbel

  __device__ void replace_by(const Candidate& other) {  // if there is another; field by field, to stay in registers
    const bool is_other = other.token >= 0;
    token = is_other ? other.token : token;
    word = is_other ? other.word : word;
    z = is_other ? other.z : z;
    bound = is_other ? other.bound : bound;
  }
};

// A thread's part of the argmax of z + gumbel.
struct Winner {
  double value = -static_cast<double>(kInfinity);
  double noise = 0;
  int token = INT32_MAX;
  double runner_up = -static_cast<double>(kInfinity);  // the second value

  __device__ void meet(const Candidate& candidate) {
    const double own_noise = gumbel(candidate.word);
    const double own_value = candidate.z + own_noise;
    const bool wins = beats(own_value, candidate.token, value, token);
    runner_up = fmax(runner_up, wins ? value : own_value);
    value = wins ? own_value : value;
    noise = wins ? own_noise : noise;
    token = wins ? candidate.token : token;
  }
};

// The lane's tokens in a chunk that its best logit does not rule out, a bit each.
template <LogitsType kType>
__device__ __forceinline__ unsigned possible_tokens(const Contest<kType>& contest, int chunk, float needed) {
  const uint32_t highest = contest.chunk_best[chunk];
  const float z_bound = scaled_logit_bound(score_of(highest), contest.maximum, contest.settings.scale_of_bound);
  if (highest > contest.last_kept || z_bound + kGumbelBound < needed) {
    return 0;
  }
  const LaneWords words = lane_words(contest.seed, contest.position, chunk);
  const uint32_t largest = largest_word_reaching(needed - z_bound);
  if (words.least() > largest) {
    return 0;
  }
  unsigned possible = 0;
#pragma unroll
  for (int j = 0; j < kLaneTokens; ++j) {
    possible |= words[j] <= largest ? 1u << j : 0;
  }
  return possible;
}

// The token, with token = -1 where its own logit rules it out.
template <LogitsType kType>
__device__ Candidate candidate_of(const Contest<kType>& contest, int token, Needed& needed) {
  if (token >= contest.row.vocabulary) {
    return {};
  }
  const float logit = contest.row.at(token);
  if (standing_of(logit) > contest.last_kept) {
    return {};
  }
  const double z = contest.settings.scale(logit, contest.maximum);
  if (z < contest.settings.least_z && logit != contest.maximum) {
    return {};
  }
  const uint32_t word = noise_word(contest.seed, contest.position, token);
  const float bound = static_cast<float>(z) + gumbel_bound(word);
  if (!(bound >= needed.value)) {
    return {};
  }
  needed.raise(static_cast<float>(z) + gumbel_floor(word) - kNoiseSlack);
  return {token, word, z, bound};
}

// Each thread's winner among its tokens, or none where others are sure to win; a warp takes a chunk at a time. Float32
// rules out most tokens. Of the rest each thread keeps one waiting as long as no other comes: better tokens of other
// threads rule most of those out too, before anyone takes logarithms in float64.
template <int kThreads, LogitsType kType>
__device__ Winner best_tokens(const Contest<kType>& contest) {
  TAPS_SHARED(uint32_t, shared_needed, 1);
  const uint32_t likeliest_word = noise_word(contest.seed, contest.position, contest.likeliest);
  Needed needed{gumbel_floor(likeliest_word) - kNoiseSlack, shared_needed};
  if (threadIdx.x == 0) {
    shared_needed[0] = standing_of(needed.value);
  }
  __syncthreads();
  Winner winner;
  Candidate waiting;
  for (int chunk = contest.first + warp_index();; chunk += kThreads / kWarp) {
    const bool is_over = chunk >= contest.end;
    if (is_over) {
      __syncthreads();  // for the last raise of any thread
    }
    needed.refresh();
    unsigned possible = is_over ? 0 : possible_tokens(contest, chunk, needed.value);
    while (possible != 0 || is_over) {
      Candidate candidate;
      if (!is_over) {
        candidate = candidate_of(contest, LaneWords::token(chunk, __ffs(static_cast<int>(possible)) - 1), needed);
        possible &= possible - 1;
      }
      if ((is_over || candidate.token >= 0) && waiting.token >= 0 && waiting.bound >= needed.value) {
        winner.meet(waiting);
      }
      if (is_over) {
        return winner;
      }
      waiting.replace_by(candidate);
    }
  }
}

struct Drawn {
  RowKey key;
  int token;       // -1 where the row is invalid
  bool is_winner;  // whether this thread is the one that met it,
  double noise;    // with this noise
  bool is_close;   // whether another token comes within `slack`
};

// Task and settings lie in shared memory: what the compiler derives from them would else fill registers from the start
// of the kernel to its end. chunk_best: a word a chunk of the row, in shared memory too.
template <int kThreads, LogitsType kType>
__device__ Drawn draw_token(const DrawTask<kType>& task, const DrawSettings& settings, double slack,
                            uint32_t* chunk_best) {
  const RowKey key = scan_row<kThreads>(task.row, task.first, task.end, settings.is_greedy ? nullptr : chunk_best);
  if (settings.is_greedy || !is_valid(key)) {
    return {key, is_valid(key) ? token_of_key(key) : -1, threadIdx.x == 0, 0, false};
  }
  uint32_t last_kept = kNeverKept - 1;
  if (settings.has_filter(task.row.vocabulary)) {
    const ScannedRow<kType> scanned{task.row, chunk_best, score_of(standing_of_key(key))};
    last_kept = last_kept_standing<kThreads>(scanned, settings.scale, settings.top_k, settings.top_p);
  }
  const Contest<kType> contest{task.row,          task.first,
                               task.end,          chunk_best,
                               settings,          score_of(standing_of_key(key)),
                               token_of_key(key), last_kept,
                               settings.seed,     settings.root_position + task.depth};
  const Winner winner = best_tokens<kThreads>(contest);
  const double value = block_reduce<kThreads>(winner.value, [](double a, double b) { return a > b ? a : b; });
  const int token =
      block_reduce<kThreads>(winner.value == value ? winner.token : INT32_MAX, [](int a, int b) { return min(a, b); });
  const bool is_winner = winner.token == token;
  const double rival = is_winner ? winner.runner_up : winner.value;
  return {key, token, is_winner, winner.noise, __syncthreads_or(rival >= value - slack) != 0};
}

}  // namespace taps::cuda
