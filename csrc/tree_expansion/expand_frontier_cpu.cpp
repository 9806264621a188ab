#include "tree_expansion/expand_frontier.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/coupling_rule.h"
#include "common/logits.h"
#include "common/noise_block.h"
#include "common/philox.h"

namespace taps::cpu {

namespace {

// The logits by which a node's children are ranked: the drafter's own, or with the noise of the node's request.
struct NodeRow {
  LogitsRow own;
  const float* noise;  // whole blocks of the vocabulary, or null
  Coupling coupling;
  int64_t vocabulary;

  TAPS_INLINE float at(int64_t token) const {
    return noise != nullptr ? coupling(own.at(token), noise[token]) : own.at(token);
  }

  TAPS_INLINE const float* block(int64_t index, float* buffer) const {
    if (noise == nullptr) {
      return own.block(index, buffer);
    }
    alignas(64) float converted[kBlock];
    const float* logits = own.block(index, converted);
    for (int j = 0; j < kBlock; ++j) {
      buffer[j] = coupling(logits[j], noise[index * kBlock + j]);
    }
    return buffer;
  }
};

constexpr int kChunk = 64;  // blocks, 4096 tokens: from memory once, then from the nearest cache

constexpr float kLeastExponent = -87;  // exp of it, 1e-38, is still normal and adds nothing to a sum of at least 1

// exp(z) for z in [kLeastExponent, 0], to 2e-7 relative. Coefficients: Cephes, expf.
TAPS_INLINE float exp_nonpositive(float z) {
  constexpr float kRounder = 0x1.8p23f;  // added to a small number, it leaves the nearest integer in the lowest bits
  const float shifted = z * 1.44269504f + kRounder;
  const float exponent = shifted - kRounder;
  const float r = (z - exponent * 0.693359375f) - exponent * -2.12194440e-4f;
  float power = 1.9875691500e-4f;
  power = power * r + 1.3981999507e-3f;
  power = power * r + 8.3334519073e-3f;
  power = power * r + 4.1665795894e-2f;
  power = power * r + 1.6666665459e-1f;
  power = power * r + 5.0000001201e-1f;
  power = power * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return power * float_from_bits((bits << 23) + (127u << 23));
}

// The distribution of a row in one pass, relative to the largest logit so far.
struct Distribution {
  float maximum = -kInfinity;
  double sum = 0;       // of exp(x - maximum)
  double weighted = 0;  // of exp(x - maximum) * (x - maximum)

  void raise_maximum(float larger) {
    if (sum > 0) {
      const double step = static_cast<double>(maximum) - static_cast<double>(larger);
      weighted = std::exp(step) * (weighted + step * sum);
      sum *= std::exp(step);
    }
    maximum = larger;
  }

  double log_probability(float logit) const {
    const double z = static_cast<double>(logit) - static_cast<double>(maximum);
    return std::min(0.0, z - std::log(sum));
  }

  double entropy() const { return std::max(0.0, std::log(sum) - weighted / sum); }
};

// Sums in float32 within a block, in float64 over blocks: rounding does not grow with the vocabulary.
TAPS_EACH_CPU void add_blocks(const NodeRow& row, int64_t first, int64_t last, Distribution& distribution) {
  alignas(64) float buffer[kBlock];
  alignas(64) double sums[16] = {};
  alignas(64) double weighted[16] = {};
  const float maximum = distribution.maximum;
  for (int64_t index = first; index < last; ++index) {
    const float* block = row.block(index, buffer);
    alignas(64) float powers[kBlock];
    alignas(64) float products[kBlock];
    for (int j = 0; j < kBlock; ++j) {  // a loop of its own: one with a branch around the exponential is not vectorised
      const float z = block[j] - maximum;
      products[j] = z > kLeastExponent ? z : kLeastExponent;  // -inf and NaN too
    }
    for (int j = 0; j < kBlock; ++j) {
      powers[j] = exp_nonpositive(products[j]);
      products[j] *= powers[j];
    }
    for (int j = 0; j < 16; ++j) {
      sums[j] += (powers[j] + powers[j + 16]) + (powers[j + 32] + powers[j + 48]);
      weighted[j] += (products[j] + products[j + 16]) + (products[j + 32] + products[j + 48]);
    }
  }
  for (int j = 0; j < 16; ++j) {
    distribution.sum += sums[j];
    distribution.weighted += weighted[j];
  }
}

TAPS_EACH_CPU void find_maxima(const NodeRow& row, int64_t first, int64_t last, float* block_maxima) {
  alignas(64) float buffer[kBlock];
  for (int64_t index = first; index < last; ++index) {
    block_maxima[index] = maximum_of(row.block(index, buffer));
  }
}

struct Child {
  float logit;
  int64_t token;

  bool operator<(const Child& other) const {  // better first
    return logit > other.logit || (logit == other.logit && token < other.token);
  }
};

struct Scratch {
  std::vector<float> block_maxima;
  std::vector<float> selection;
  std::vector<Child> children;
};

Distribution distribution_of(const NodeRow& row, std::vector<float>& block_maxima) {
  const int64_t blocks = num_blocks(row.vocabulary);
  block_maxima.resize(blocks);
  Distribution distribution;
  for (int64_t first = 0; first < blocks; first += kChunk) {
    const int64_t last = std::min(first + kChunk, blocks);
    find_maxima(row, first, last, block_maxima.data());
    const float maximum = *std::max_element(block_maxima.begin() + first, block_maxima.begin() + last);
    if (maximum > distribution.maximum) {
      distribution.raise_maximum(maximum);
    }
    if (std::isfinite(distribution.maximum)) {
      add_blocks(row, first, last, distribution);
    }
  }
  return distribution;
}

// The best K tokens of the row, best first, ties to the lowest token, NaN as -inf.
void find_children(const NodeRow& row, int64_t branching, Scratch& scratch) {
  const float bound = bound_of_k_best(scratch.block_maxima, branching, scratch.selection);
  std::vector<Child>& children = scratch.children;
  children.clear();
  if (bound > -kInfinity) {
    for_each_token_from(row, scratch.block_maxima, bound,
                        [&](int64_t token, float logit) { children.push_back({logit, token}); });
  } else {
    for (int64_t token = 0; token < row.vocabulary; ++token) {
      const float logit = row.at(token);
      children.push_back({logit > -kInfinity ? logit : -kInfinity, token});
    }
  }
  if (branching < static_cast<int64_t>(children.size())) {
    std::nth_element(children.begin(), children.begin() + (branching - 1), children.end());
  }
  std::sort(children.begin(), children.begin() + branching);
}

bool is_request_coupled(const ExpandFrontierParams& p, int64_t b) {
  return p.coupling.seeds != nullptr && is_coupled(p.coupling.temperature[b]);
}

// The first row of the same request: several drafters' rows share its noise.
int64_t noise_row(const ExpandFrontierParams& p, int64_t b) {
  for (int64_t a = 0; a < b; ++a) {
    if (p.coupling.seeds[a] == p.coupling.seeds[b] && p.coupling.positions[a] == p.coupling.positions[b] &&
        is_request_coupled(p, a)) {
      return a;
    }
  }
  return b;
}

NodeRow node_row(const ExpandFrontierParams& p, int64_t index) {
  const int64_t b = index / p.frontier_length;
  const int64_t offset = b * p.batch_stride + index % p.frontier_length * p.frontier_stride;
  const LogitsRow own = logits_row(p.logits, p.logits_type, offset, p.vocabulary);
  if (!is_request_coupled(p, b)) {
    return {own, nullptr, {}, p.vocabulary};
  }
  const CouplingColumns& columns = p.coupling;
  return {own, p.noise + noise_row(p, b) * num_blocks(p.vocabulary) * kBlock,
          coupling_of(columns.temperature[b], columns.alpha[b], columns.beta[b]), p.vocabulary};
}

TAPS_EACH_CPU void write_noise_blocks(NoiseBlock write_words, int64_t seed, int64_t position, int64_t first,
                                      int64_t last, float* noise) {
  alignas(64) uint32_t words[kBlock];
  for (int64_t index = first; index < last; ++index) {
    write_words(seed, position, index * kBlock, words);
    for (int j = 0; j < kBlock; ++j) {
      noise[index * kBlock + j] = coupling_noise(words[j]);
    }
  }
}

// The same for tokens anywhere in the vocabulary. Past the last of them the noise is that of the last one.
TAPS_EACH_CPU void write_noise_of(const int64_t* token_ids, int64_t count, int64_t seed, int64_t position,
                                  int64_t first, int64_t last, float* noise) {
  for (int64_t i = first * kBlock; i < last * kBlock; ++i) {
    noise[i] = coupling_noise(noise_word(seed, position, static_cast<uint32_t>(token_ids[std::min(i, count - 1)])));
  }
}

void expand_node(const ExpandFrontierParams& p, int64_t index, Scratch& scratch) {
  const NodeRow row = node_row(p, index);
  const Distribution distribution = distribution_of(row, scratch.block_maxima);
  find_children(row, p.branching, scratch);
  const bool is_valid = std::isfinite(distribution.maximum);
  const double parent = p.parent_scores[index] > -kInfinity ? p.parent_scores[index] : -kInfinity;  // NaN: no such node
  for (int64_t k = 0; k < p.branching; ++k) {
    const Child& child = scratch.children[k];
    const double log_probability = is_valid ? distribution.log_probability(child.logit) : -kInfinity;
    p.tokens[index * p.branching + k] = p.token_of(child.token);
    p.scores[index * p.branching + k] = static_cast<float>(parent + log_probability);
  }
  p.entropies[index] = is_valid ? static_cast<float>(distribution.entropy()) : 0;
}

}  // namespace

void write_noise(const ExpandFrontierParams& params, int64_t begin, int64_t end) {
  const int64_t blocks = num_blocks(params.vocabulary);
  const NoiseBlock write_words = noise_block();
  while (begin < end) {
    const int64_t b = begin / blocks;
    const int64_t last = std::min(end, (b + 1) * blocks);
    if (is_request_coupled(params, b) && noise_row(params, b) == b) {
      const int64_t seed = params.coupling.seeds[b];
      const int64_t position = params.coupling.positions[b];
      float* noise = params.noise + b * blocks * kBlock;
      if (params.token_ids == nullptr) {
        write_noise_blocks(write_words, seed, position, begin - b * blocks, last - b * blocks, noise);
      } else {
        write_noise_of(params.token_ids, params.vocabulary, seed, position, begin - b * blocks, last - b * blocks,
                       noise);
      }
    }
    begin = last;
  }
}

void expand_nodes(const ExpandFrontierParams& params, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t index = begin; index < end; ++index) {
    expand_node(params, index, scratch);
  }
}

void choose_frontier(const ExpandFrontierParams& params, int64_t begin, int64_t end) {
  const int64_t width = params.frontier_length * params.branching;
  std::vector<int64_t> order(width);
  for (int64_t b = begin; b < end; ++b) {
    const float* scores = params.scores + b * width;
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + params.branching, order.end(), [scores](int64_t a, int64_t c) {
      return scores[a] > scores[c] || (scores[a] == scores[c] && a < c);
    });
    std::copy(order.begin(), order.begin() + params.branching, params.frontier + b * params.branching);
  }
}

}  // namespace taps::cpu
