#include "lookup/lookup_index.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/coupling_rule.h"
#include "common/philox.h"

namespace taps {

namespace {

constexpr float kRate = 0.1f, kPromptRate = 0.03f;  // of the offsets, a token
constexpr float kMostOffset = 4.0f;

}  // namespace

LookupIndex::LookupIndex(int max_context) : max_context_(max_context) {
  contexts_.own.fill(ContextTrie::kNone);
  contexts_.own[0] = ContextTrie::kRoot;
  std::fill(offsets_.begin() + kLengthGroups, offsets_.end(), kStoreOffset);
}

void LookupIndex::take_runs(int length, const std::vector<std::vector<int32_t>>& runs) {
  stored_ = ContextTrie();
  for (const std::vector<int32_t>& run : runs) {
    int32_t node = ContextTrie::kRoot;
    for (const int32_t token : run) {
      node = stored_.add(node, token);
    }
  }
  contexts_.stored = ContextTrie::kRoot;
  contexts_.stored_length = length;
}

int LookupIndex::Outlook::find(int32_t token) const {
  for (int i = 0; i < num_candidates; ++i) {
    if (candidates[i].token == token) {
      return i;
    }
  }
  return -1;
}

float LookupIndex::Outlook::entropy() const {
  const auto part = [](float p, float share) { return p > 0 ? -p * std::log(share) : 0.0f; };
  float sum = part(escape, escape / kNumOthers);
  for (int i = 0; i < num_candidates; ++i) {
    sum += part(candidates[i].probability, candidates[i].probability);
  }
  return sum;
}

// Each candidate's noise at this position is known. The escape's is that of tokens nobody names: it counts with the
// mean of exp(beta * noise), gamma(1 - beta).
void LookupIndex::Outlook::couple(const LookupNoise& noise, int64_t position) {
  std::array<float, kMostCandidates> logits;
  const float others = noise.scale * std::log(escape) + std::lgamma(1 - noise.beta);
  float most = others;
  for (int i = 0; i < num_candidates; ++i) {
    const uint32_t token = static_cast<uint32_t>(candidates[i].token);
    const float drawn = coupling_noise(noise_words(noise.seed, position, token / 4).word[token % 4]);
    logits[i] = noise.scale * std::log(candidates[i].probability) + noise.beta * drawn;
    most = std::max(most, logits[i]);
  }
  escape = std::exp(others - most);
  float sum = escape;
  for (int i = 0; i < num_candidates; ++i) {
    candidates[i].probability = std::exp(logits[i] - most);
    sum += candidates[i].probability;
  }
  escape /= sum;
  for (int i = 0; i < num_candidates; ++i) {
    candidates[i].probability /= sum;
  }
}

LookupIndex::Outlook LookupIndex::look(const Contexts& contexts) const {
  Outlook outlook;
  for (int length = max_context_; length >= 1; --length) {
    add_level(trie_, contexts.own[length], length, outlook);
    if (length == std::min(contexts.stored_length, max_context_)) {
      add_level(stored_, contexts.stored, contexts.stored_length, outlook);
    }
  }
  return outlook;
}

// Adds the newest tokens that followed a context, if it has a past, and no context before: with their share of what is
// left.
void LookupIndex::add_level(const ContextTrie& trie, int32_t node, int length, Outlook& outlook) const {
  if (node == ContextTrie::kNone || outlook.escape <= kLeastEscape) {
    return;
  }
  const ContextTrie::Node& context = trie[node];
  const bool is_stored = &trie == &stored_;
  const int begin = outlook.num_candidates;
  int end = begin;
  float sum = 0;
  int32_t child = context.newest;
  for (int seen = 0; child != ContextTrie::kNone && seen < kMostContinuations && end < kMostCandidates; ++seen) {
    const ContextTrie::Node& next = trie[child];
    if (outlook.find(next.token) < 0) {
      const float weight = continuation_weight(next.count, !is_stored && end == begin);
      outlook.candidates[end++] = {next.token, weight};
      sum += weight;
    }
    child = next.older;
  }
  if (end == begin) {
    return;
  }
  const int group = length_group(length) + (is_stored ? kLengthGroups : 0);
  const float logit = hit_logit(length, context.total, context.num_children, outlook.num_levels) + offsets_[group];
  const float hit = 1 / (1 + std::exp(-logit));
  for (int i = begin; i < end; ++i) {
    outlook.candidates[i].probability *= outlook.escape * hit / sum;
  }
  outlook.levels[outlook.num_levels++] = {group, hit, begin, end};
  outlook.num_candidates = end;
  outlook.escape *= 1 - hit;
}

// Moves the offsets of the contexts that hit or missed: a step of logistic regression each.
void LookupIndex::correct(const Outlook& outlook, int candidate, float rate) {
  for (int i = 0; i < outlook.num_levels; ++i) {
    const Level& level = outlook.levels[i];
    const bool is_hit = level.begin <= candidate && candidate < level.end;
    float& offset = offsets_[level.group];
    offset = std::clamp(offset + rate * ((is_hit ? 1.0f : 0.0f) - level.hit), -kMostOffset, kMostOffset);
    if (is_hit) {
      return;
    }
  }
}

void LookupIndex::append(const int64_t* tokens, int64_t count, bool is_prompt, float* log_probs) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t token = static_cast<int32_t>(tokens[i]);
    const Outlook outlook = look(contexts_);
    const int candidate = outlook.find(token);
    log_probs[i] = std::log(candidate >= 0 ? outlook.candidates[candidate].probability : outlook.escape / kNumOthers);
    correct(outlook, candidate, is_prompt ? kPromptRate : kRate);
    extend(token);
  }
}

// The contexts that end with the new token are the old ones, each followed by it.
void LookupIndex::extend(int32_t token) {
  for (int length = max_context_; length >= 0; --length) {
    if (contexts_.own[length] != ContextTrie::kNone) {
      const int32_t node = trie_.add(contexts_.own[length], token);
      if (length < max_context_) {
        contexts_.own[length + 1] = node;
      }
    }
  }
  follow_store(token, contexts_);
  ++size_;
}

LookupIndex::Contexts LookupIndex::behind(const Contexts& contexts, int32_t token) const {
  Contexts next = contexts;
  next.own.fill(ContextTrie::kNone);
  next.own[0] = ContextTrie::kRoot;
  for (int length = 0; length < max_context_; ++length) {
    if (contexts.own[length] != ContextTrie::kNone) {
      next.own[length + 1] = trie_.find(contexts.own[length], token);
    }
  }
  follow_store(token, next);
  return next;
}

void LookupIndex::follow_store(int32_t token, Contexts& contexts) const {
  if (contexts.stored != ContextTrie::kNone) {
    contexts.stored = stored_.find(contexts.stored, token);
    ++contexts.stored_length;
  }
}

struct LookupIndex::Drafted {
  int32_t token, parent;  // the parent's place in the tree
  int64_t depth;
  float score, entropy;
  int64_t order;  // of finding it: ties go to the first

  bool operator<(const Drafted& other) const {
    return score < other.score || (score == other.score && order > other.order);
  }
};

int64_t LookupIndex::propose(const LookupShape& shape, const LookupNoise* noise, const LookupTree& tree) const {
  const double least = std::max<double>(shape.min_score, std::numeric_limits<float>::lowest());
  std::vector<Drafted> heap;
  std::vector<Contexts> contexts = {contexts_};
  int64_t order = 0;
  const auto expand = [&](int32_t parent, int64_t depth, float score) {
    if (depth >= shape.depth) {
      return;
    }
    Outlook outlook = look(contexts[parent]);
    if (noise != nullptr) {
      outlook.couple(*noise, size_ + depth);
    }
    const auto begin = outlook.candidates.begin(), end = begin + outlook.num_candidates;
    std::stable_sort(begin, end, [](const auto& a, const auto& b) { return a.probability > b.probability; });
    const int64_t num_children = std::min<int64_t>(shape.branching, outlook.num_candidates);
    const float entropy = outlook.entropy();
    for (int64_t i = 0; i < num_children; ++i) {
      const float child_score = score + std::min(std::log(outlook.candidates[i].probability), 0.0f);
      if (child_score >= least) {
        heap.push_back({outlook.candidates[i].token, parent, depth + 1, child_score, entropy, order++});
        std::push_heap(heap.begin(), heap.end());
      }
    }
  };
  expand(0, 0, 0.0f);
  int64_t count = 1;
  for (; count < shape.max_nodes && !heap.empty(); ++count) {
    std::pop_heap(heap.begin(), heap.end());
    const Drafted best = heap.back();
    heap.pop_back();
    tree.tokens[count] = best.token;
    tree.parents[count] = best.parent;
    tree.scores[count] = best.score;
    tree.entropies[count] = best.entropy;
    contexts.push_back(behind(contexts[best.parent], best.token));
    expand(static_cast<int32_t>(count), best.depth, best.score);
  }
  return count;
}

}  // namespace taps
