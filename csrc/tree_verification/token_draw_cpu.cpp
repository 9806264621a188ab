#include "tree_verification/token_draw.h"

#include <cfloat>
#include <cmath>
#include <numeric>

#include "common/noise_block.h"
#include "common/philox.h"
#include "common/sampling_rule.h"

namespace taps::cpu {

namespace {

// ---- First pass: the maximum of each block, and whether any logit is NaN. ----

TAPS_INLINE int32_t is_nan(float value) {
  return value != value;
}

TAPS_EACH_CPU bool scan_row(const LogitsRow& row, float* block_maxima) {
  alignas(64) float buffer[kBlock];
  alignas(64) int32_t any_nan[16] = {};
  const int64_t blocks = num_blocks(row.vocabulary);
  for (int64_t index = 0; index < blocks; ++index) {
    const float* block = row.block(index, buffer);
    for (int j = 0; j < 16; ++j) {
      any_nan[j] |= is_nan(block[j]) | is_nan(block[j + 16]) | is_nan(block[j + 32]) | is_nan(block[j + 48]);
    }
    block_maxima[index] = maximum_of(block);
  }
  return std::any_of(any_nan, any_nan + 16, [](int32_t any) { return any != 0; });
}

// ---- Selection by weight, for top-p and for a large top-k: bins of equal width, from the maximum down. ----

constexpr int kBins = 2048;

// Monotone in the logit, rounding included: a token of a lower bin has a strictly larger logit.
struct Bins {
  float maximum;
  float per_logit;

  TAPS_INLINE int32_t operator()(float logit) const {
    const float bin = (maximum - logit) * per_logit;
    return static_cast<int32_t>(bin < kBins - 1 ? bin : kBins - 1);
  }
};

// The least finite logit of at least `least`, or the maximum.
TAPS_EACH_CPU float least_finite(const LogitsRow& row, const float* block_maxima, float least, float maximum) {
  alignas(64) float buffer[kBlock];
  alignas(64) float lowest[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    lowest[j] = maximum;
  }
  const int64_t blocks = num_blocks(row.vocabulary);
  for (int64_t index = 0; index < blocks; ++index) {
    if (block_maxima[index] < least) {
      continue;
    }
    const float* block = row.block(index, buffer);
    for (int j = 0; j < kBlock; ++j) {
      const float logit = (block[j] > -kInfinity) & (block[j] >= least) ? block[j] : maximum;
      lowest[j] = logit < lowest[j] ? logit : lowest[j];
    }
  }
  return *std::min_element(lowest, lowest + kBlock);
}

// Over the span of the logits, and no further than weights are above 0.
Bins bins_for(const LogitsRow& row, const float* block_maxima, float least, const TokenWeight& weight) {
  const float lowest = least_finite(row, block_maxima, least, weight.maximum);
  double span = static_cast<double>(weight.maximum) - static_cast<double>(lowest);
  if (!weight.counts_tokens) {
    span = std::min(span, 32 * weight.temperature);
  }
  return {weight.maximum, static_cast<float>(std::min<double>(kBins / span, FLT_MAX))};
}

TAPS_INLINE void weigh_block(const float* block, bool counts_tokens, float maximum, double temperature,
                             uint64_t* weights) {
  if (counts_tokens) {
    std::fill(weights, weights + kBlock, 1);
    return;
  }
  for (int j = 0; j < kBlock; ++j) {
    weights[j] = token_weight(scaled_logit(block[j], maximum, temperature));
  }
}

TAPS_EACH_CPU void add_weights(const LogitsRow& row, const float* block_maxima, float least, TokenWeight weight,
                               Bins bins, uint64_t* bin_weights) {
  alignas(64) float buffer[kBlock];
  alignas(64) uint64_t weights[kBlock];
  alignas(64) int32_t bin[kBlock];
  const int64_t blocks = num_blocks(row.vocabulary);
  for (int64_t index = 0; index < blocks; ++index) {
    if (block_maxima[index] < least || weight(block_maxima[index]) == 0) {
      continue;
    }
    const float* block = row.block(index, buffer);
    weigh_block(block, weight.counts_tokens, weight.maximum, weight.temperature, weights);
    for (int j = 0; j < kBlock; ++j) {
      weights[j] = block[j] >= least ? weights[j] : 0;
    }
    for (int j = 0; j < kBlock; ++j) {
      bin[j] = bins(block[j]);
    }
    for (int j = 0; j < kBlock; ++j) {
      bin_weights[bin[j]] += weights[j];
    }
  }
}

// Appends the logits of at least `least` in the bin.
TAPS_EACH_CPU void copy_bin(const LogitsRow& row, const float* block_maxima, float least, Bins bins, int32_t wanted,
                            std::vector<float>& logits) {
  alignas(64) float buffer[kBlock];
  alignas(64) int32_t is_wanted[kBlock];
  const int64_t blocks = num_blocks(row.vocabulary);
  for (int64_t index = 0; index < blocks; ++index) {
    if (block_maxima[index] < least || bins(block_maxima[index]) > wanted) {
      continue;
    }
    const float* block = row.block(index, buffer);
    int32_t count = 0;
    for (int j = 0; j < kBlock; ++j) {
      is_wanted[j] = (bins(block[j]) == wanted) & (block[j] >= least);
      count += is_wanted[j];
    }
    for (int j = 0; count > 0; ++j) {
      if (is_wanted[j] != 0) {
        logits.push_back(block[j]);
        --count;
      }
    }
  }
}

// ---- Min-p ----

// Floats in order, as integers.
int64_t rank_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits >= 0 ? bits : -static_cast<int64_t>(bits & 0x7FFFFFFF);
}

float value_of(int64_t rank) {
  return rank >= 0 ? float_from_bits(static_cast<uint32_t>(rank)) : -float_from_bits(static_cast<uint32_t>(-rank));
}

// The least float32 whose z passes; z grows with the logit, so bisection over the floats is exact.
float least_of_min_p(double temperature, double min_p, float maximum) {
  const double least_z = std::log(min_p);
  int64_t fails = rank_of(-kInfinity);
  int64_t passes = rank_of(maximum);
  while (passes - fails > 1) {
    const int64_t middle = fails + (passes - fails) / 2;
    (scaled_logit(value_of(middle), maximum, temperature) >= least_z ? passes : fails) = middle;
  }
  return value_of(passes);
}

// ---- The draw ----

struct Best {
  double value;
  int64_t token;
};

struct Noise {
  int64_t seed;
  int64_t position;

  double at(int64_t token) const {
    return gumbel(noise_words(seed, position, static_cast<uint32_t>(token / 4)).word[token % 4]);
  }
};

// The argmax of z + gumbel over the tokens of at least `least`, given one of them. In float32 until a token could win.
TAPS_EACH_CPU Best best_token(const LogitsRow& row, const float* block_maxima, float maximum, float least,
                              double temperature, Noise noise, Best best) {
  alignas(64) float buffer[kBlock];
  alignas(64) uint32_t words[kBlock];
  alignas(64) float bounds[kBlock];
  const NoiseBlock write_words = noise_block();
  const float scale = scale_of_bound(temperature);
  float needed = static_cast<float>(best.value) - kBoundSlack;
  const int64_t blocks = num_blocks(row.vocabulary);
  for (int64_t index = 0; index < blocks; ++index) {
    const float highest = block_maxima[index];
    if (highest < least || scaled_logit_bound(highest, maximum, scale) + kGumbelBound < needed) {
      continue;
    }
    const int64_t first = index * kBlock;
    write_words(noise.seed, noise.position, first, words);
    const float* block = row.block(index, buffer);
    int32_t candidates = 0;
    for (int j = 0; j < kBlock; ++j) {
      bounds[j] = scaled_logit_bound(block[j], maximum, scale) + gumbel_bound(words[j]);
      candidates |= (bounds[j] >= needed) & (block[j] >= least);
    }
    for (int j = 0; candidates != 0 && j < kBlock; ++j) {
      if (bounds[j] < needed || block[j] < least) {
        continue;
      }
      const double value = scaled_logit(block[j], maximum, temperature) + gumbel(words[j]);
      if (beats(value, first + j, best.value, best.token)) {
        best = {value, first + j};
        needed = static_cast<float>(value) - kBoundSlack;
      }
    }
  }
  return best;
}

}  // namespace

int64_t TokenDraw::operator()(const LogitsRow& row, const DrawSettings& settings, int64_t position) {
  block_maxima_.resize(num_blocks(row.vocabulary));
  const bool has_nan = scan_row(row, block_maxima_.data());
  const float maximum = *std::max_element(block_maxima_.begin(), block_maxima_.end());
  if (has_nan || !std::isfinite(maximum)) {
    return -1;
  }
  const int64_t likeliest = lowest_token_of(row, maximum);
  if (settings.temperature == 0) {
    return likeliest;
  }
  const float least = least_kept_logit(row, settings, maximum);
  const Noise noise{settings.seed, position};
  return best_token(row, block_maxima_.data(), maximum, least, settings.temperature, noise,
                    {noise.at(likeliest), likeliest})
      .token;
}

int64_t TokenDraw::lowest_token_of(const LogitsRow& row, float maximum) const {
  const auto block = std::find(block_maxima_.begin(), block_maxima_.end(), maximum);
  int64_t token = (block - block_maxima_.begin()) * kBlock;
  while (row.at(token) != maximum) {
    ++token;
  }
  return token;
}

// The threshold of all filters together.
float TokenDraw::least_kept_logit(const LogitsRow& row, const DrawSettings& settings, float maximum) {
  float least = -kInfinity;
  if (0 < settings.top_k && settings.top_k < row.vocabulary) {
    least = least_of_top_k(row, settings.top_k, maximum);
  }
  if (settings.top_p < 1) {
    least = least_to_reach(row, {false, maximum, settings.temperature}, settings.top_p, least);
  }
  if (settings.min_p > 0) {
    least = std::max(least, least_of_min_p(settings.temperature, settings.min_p, maximum));
  }
  return least;
}

float TokenDraw::least_of_top_k(const LogitsRow& row, int64_t k, float maximum) {
  const float bound = bound_of_k_best(block_maxima_, k, scratch_);
  if (bound == -kInfinity) {
    return least_to_reach(row, {true, maximum, 1}, k, bound);
  }
  scratch_.clear();
  for_each_token_from(row, block_maxima_, bound, [this](int64_t, float logit) { scratch_.push_back(logit); });
  std::nth_element(scratch_.begin(), scratch_.begin() + (k - 1), scratch_.end(), std::greater<float>());
  return scratch_[k - 1];
}

// The largest logit such that the tokens from it up, of those of at least `least`, weigh the limit: `wanted` tokens, or
// the share `wanted` of the weight of them all. One histogram finds the bin where that happens, a selection the logit.
float TokenDraw::least_to_reach(const LogitsRow& row, TokenWeight weight, double wanted, float least) {
  const Bins bins = bins_for(row, block_maxima_.data(), least, weight);
  bin_weights_.assign(kBins, 0);
  add_weights(row, block_maxima_.data(), least, weight, bins, bin_weights_.data());
  const uint64_t total = std::accumulate(bin_weights_.begin(), bin_weights_.end(), uint64_t{0});
  const double limit = weight.counts_tokens ? wanted : wanted * static_cast<double>(total);
  uint64_t above = 0;
  int32_t bin = 0;
  while (!reaches(above + bin_weights_[bin], limit)) {
    above += bin_weights_[bin++];
  }
  scratch_.clear();
  copy_bin(row, block_maxima_.data(), least, bins, bin, scratch_);
  candidates_.clear();
  for (const float logit : scratch_) {
    candidates_.push_back({logit, weight(logit)});
  }
  return least_candidate(above, limit);
}

// Halving the candidates by selection is linear in their number, and any order of equal logits ends at the same logit.
float TokenDraw::least_candidate(uint64_t above, double limit) {
  auto first = candidates_.begin();
  auto last = candidates_.end();
  while (last - first > 1) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; });
    uint64_t upper = 0;
    for (auto candidate = first; candidate != middle; ++candidate) {
      upper += candidate->weight;
    }
    if (reaches(above + upper, limit)) {
      last = middle;
    } else {
      above += upper;
      first = middle;
    }
  }
  return first->logit;
}

}  // namespace taps::cpu
