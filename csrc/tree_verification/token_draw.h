// One draw from one row of logits, on the CPU: common/sampling_rule.h, without sorting the vocabulary and without a
// logarithm for each token. verify_tree calls it for the rows that its walk visits.
#pragma once

#include <cstdint>
#include <vector>

#include "common/logits.h"
#include "common/sampling_rule.h"

namespace taps::cpu {

struct DrawSettings {
  double temperature;  // 0: greedy
  int64_t top_k;       // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off
  int64_t seed;
};

// What a token weighs in a selection by weight: one, or its share of the probability.
struct TokenWeight {
  bool counts_tokens;
  float maximum;
  double temperature;

  TAPS_INLINE uint64_t operator()(float logit) const {
    return counts_tokens ? 1 : token_weight(scaled_logit(logit, maximum, temperature));
  }
};

class TokenDraw {
 public:
  // The token that the row yields at this absolute position, or -1 where it holds NaN or no finite maximum.
  int64_t operator()(const LogitsRow& row, const DrawSettings& settings, int64_t position);

 private:
  struct Candidate {
    float logit;
    uint64_t weight;
  };

  int64_t lowest_token_of(const LogitsRow& row, float maximum) const;
  float least_kept_logit(const LogitsRow& row, const DrawSettings& settings, float maximum);
  float least_of_top_k(const LogitsRow& row, int64_t k, float maximum);
  float least_to_reach(const LogitsRow& row, TokenWeight weight, double wanted, float least);
  float least_candidate(uint64_t above, double limit);

  // Scratch, kept between rows.
  std::vector<float> block_maxima_;
  std::vector<float> scratch_;
  std::vector<uint64_t> bin_weights_;
  std::vector<Candidate> candidates_;
};

}  // namespace taps::cpu
