// The index of one row's text, on the host: which tokens followed the last 1 to `max_context` tokens before, how
// probably they follow again, and the tree of the most probable continuations. Costs are bounded by the constants here
// and by `max_context`, and do not grow with the text.
//
// A token's probability is that of prediction by partial matching (Cleary and Witten, 1984): the longest context with a
// past gets the probability of a hit, shared by the tokens that followed it; what is left, the escape, goes to the next
// shorter context and its further tokens, and so on. The probability of a hit comes from hit_table.h, with an offset
// for each length that the row's own text corrects as it grows.
//
// A corpus store may say what followed its longest match of the text's end. These continuations are one more context,
// behind the row's own one of the same length, with offsets of their own.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "lookup/context_trie.h"
#include "lookup/hit_table.h"

namespace taps {

constexpr int kMostContext = 32;        // tokens of the longest context that may be asked for
constexpr int kMostContinuations = 16;  // tokens looked at behind one context, the newest ones
constexpr int kMostCandidates = 48;     // tokens looked at behind all contexts of a node
constexpr float kLeastEscape = 0.02f;   // shorter contexts are not looked at for less
constexpr float kNumOthers = 1000.0f;   // the escape counts as spread over so many tokens: in evidence and entropies

// What a proposal may hold, as TreeShape says; max_nodes counts the root.
struct LookupShape {
  int64_t depth, branching, max_nodes;
  double min_score;
};

// How a row couples its proposals to the noise of the target's draws (common/coupling_rule.h).
struct LookupNoise {
  int64_t seed;
  float scale;  // alpha / T
  float beta;   // below 1
};

// The rows of one tree, each of at least max_nodes entries; entry 0, the root, is left as it is.
struct LookupTree {
  int64_t* tokens;
  int64_t* parents;
  float* scores;     // cumulative log-probabilities
  float* entropies;  // nats
};

class LookupIndex {
 public:
  explicit LookupIndex(int max_context);

  // Number of tokens appended so far.
  int64_t size() const { return size_; }
  size_t num_bytes() const { return trie_.num_bytes() + stored_.num_bytes(); }

  // Appends tokens; log_probs[i] is the log-probability that tokens[i] had just before. The hits and misses correct the
  // offsets, those of a prompt less.
  void append(const int64_t* tokens, int64_t count, bool is_prompt, float* log_probs);

  // Takes what followed a corpus store's longest match, of `length` tokens, of the text's end. It holds until it is
  // taken again, for texts that go on as one of `runs` does.
  void take_runs(int length, const std::vector<std::vector<int32_t>>& runs);

  // Writes the best continuations, parents first, best first; returns the number of nodes, root included. With noise,
  // which may be null, they are the tokens that the target is about to draw.
  int64_t propose(const LookupShape& shape, const LookupNoise* noise, const LookupTree& tree) const;

 private:
  struct Contexts {
    std::array<int32_t, kMostContext + 1> own;  // [n]: the node of the last n tokens, or kNone
    int32_t stored = ContextTrie::kNone;        // the node of stored_
    int stored_length = 0;                      // tokens of the store's match, those since taking it included
  };

  struct Candidate {
    int32_t token;
    float probability;
  };

  struct Level {  // a context with a past
    int group;
    float hit;  // probability that a token of [begin, end) comes, if none before `begin` does
    int begin, end;
  };

  struct Outlook {
    std::array<Candidate, kMostCandidates> candidates;
    std::array<Level, kMostContext + 1> levels;
    int num_candidates = 0, num_levels = 0;
    float escape = 1;

    int find(int32_t token) const;  // the candidate's place, or -1
    float entropy() const;
    void couple(const LookupNoise& noise, int64_t position);
  };

  struct Drafted;  // a node of a growing tree

  Outlook look(const Contexts& contexts) const;
  void add_level(const ContextTrie& trie, int32_t node, int length, Outlook& outlook) const;
  void correct(const Outlook& outlook, int candidate, float rate);
  void extend(int32_t token);
  Contexts behind(const Contexts& contexts, int32_t token) const;
  void follow_store(int32_t token, Contexts& contexts) const;

  int max_context_;
  int64_t size_ = 0;
  ContextTrie trie_;
  ContextTrie stored_;                              // the store's runs: its root is their match
  Contexts contexts_;                               // of the text's end
  std::array<float, 2 * kLengthGroups> offsets_{};  // of the row's own contexts, then of the store's
};

}  // namespace taps
