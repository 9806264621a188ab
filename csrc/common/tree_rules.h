// What a parent array means, once, for the CPU loops and the CUDA kernels: parents, depths, ancestors, the ranking of
// nodes under a budget. A node at or past `count` is padding: its parent entry is never read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/device.h"

namespace taps {

// The node's parent, -1 at the root. Padding is a child of the root, so that its attention row is never empty.
TAPS_HD inline int64_t parent_of(const int64_t* parents, int64_t count, int64_t node) {
  return node < count ? parents[node] : 0;
}

// For kernels, whose input is unchecked: the same values on a valid tree, and safe on any other.
TAPS_HD inline int64_t safe_count(int64_t count, int64_t nodes) {
  return count < 1 ? 1 : count < nodes ? count : nodes;
}

// `entry` is parents[node], which may be read before the count has arrived: padding's is not used.
TAPS_HD inline int64_t safe_parent_of(int64_t entry, int64_t count, int64_t node) {
  const bool is_sound = node < count && static_cast<uint64_t>(entry) < static_cast<uint64_t>(node);
  return node == 0 ? -1 : is_sound ? entry : 0;
}

TAPS_HD inline int64_t safe_parent(const int64_t* parents, int64_t count, int64_t node) {
  return safe_parent_of(parent_of(parents, count, node), count, node);
}

// The first node whose parent does not come before it, or -1. (One unsigned comparison covers both ends.)
TAPS_HD inline int64_t first_bad_parent(const int64_t* parents, int64_t count) {
  for (int64_t node = 1; node < count; ++node) {
    if (static_cast<uint64_t>(parents[node]) >= static_cast<uint64_t>(node)) {
      return node;
    }
  }
  return -1;
}

// The first node whose token is outside [0, num_tokens), or -1.
TAPS_HD inline int64_t first_bad_token(const int64_t* tokens, int64_t count, int64_t num_tokens) {
  for (int64_t node = 0; node < count; ++node) {
    if (static_cast<uint64_t>(tokens[node]) >= static_cast<uint64_t>(num_tokens)) {
      return node;
    }
  }
  return -1;
}

// The depth of a node whose ancestors' depths are known.
TAPS_HD inline int64_t depth_below(const int64_t* depths, int64_t parent) {
  return parent < 0 ? 0 : depths[parent] + 1;
}

// Calls visit(ancestor) for the node itself, its parent, ..., the root.
template <typename Visit>
TAPS_HD inline void for_each_ancestor(const int64_t* parents, int64_t count, int64_t node, Visit visit) {
  visit(node);
  if (node >= count) {
    node = 0;
    visit(node);
  }
  while ((node = parents[node]) >= 0) {
    visit(node);
  }
}

// ---- Ranking: score descending, then index ascending; a node counts at most its parent's score. ----

constexpr uint32_t kNeverKept = 0xFFFFFFFFu;  // the standing of -inf and NaN

// A score as an unsigned number that grows as the score falls; equal scores (0 and -0 too) are equal.
TAPS_HD inline uint32_t standing_of(float score) {
  if (!(score > -__builtin_inff())) {
    return kNeverKept;
  }
  score += 0.0f;  // -0 becomes 0
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  return (bits >> 31) != 0 ? bits : 0x7FFFFFFFu - bits;
}

// The score that has this standing, -inf for what is never kept.
TAPS_HD inline float score_of(uint32_t standing) {
  const uint32_t bits = standing == kNeverKept  ? 0xFF800000u
                        : (standing >> 31) != 0 ? standing
                                                : 0x7FFFFFFFu - standing;
  float score;
  memcpy(&score, &bits, sizeof(score));
  return score;
}

// Keys are unique, smaller is better, and an ancestor's is smaller than its descendants': the best `budget` keys of a
// tree are therefore a tree, exact ties included.
TAPS_HD inline uint64_t rank_key(float score, int64_t node, uint64_t parent_key) {
  const uint32_t own = standing_of(score);
  const uint32_t above = static_cast<uint32_t>(parent_key >> 32);
  return static_cast<uint64_t>(own > above ? own : above) << 32 | static_cast<uint64_t>(node);
}

TAPS_HD inline uint64_t root_key(float score) {
  return static_cast<uint64_t>(standing_of(score)) << 32;
}

// The keys of a tree's nodes, in input order.
TAPS_HD inline void rank_nodes(const float* scores, const int64_t* parents, int64_t count, uint64_t* keys) {
  keys[0] = root_key(scores[0]);
  for (int64_t node = 1; node < count; ++node) {
    keys[node] = rank_key(scores[node], node, keys[parents[node]]);
  }
}

// The worst key among the best `budget` nodes, root included. `scratch` holds `count` keys. Host only.
inline uint64_t worst_kept_key(const uint64_t* keys, int64_t count, int64_t budget, uint64_t* scratch) {
  if (budget >= count) {
    return UINT64_MAX;
  }
  if (budget <= 1) {
    return 0;
  }
  std::copy(keys + 1, keys + count, scratch);
  uint64_t* worst = scratch + (budget - 2);  // the root is not among them
  std::nth_element(scratch, worst, scratch + (count - 1));
  return *worst;
}

// Whether a node other than the root, which always is, is kept.
TAPS_HD inline bool is_kept(uint64_t key, uint64_t worst_kept) {
  return key <= worst_kept && (key >> 32) != kNeverKept;
}

// Equal prefixes become one node: the union keeps the largest score, and a NaN yields to any number.
TAPS_HD inline float merged_score(float first, float second) {
  return second > first || first != first ? second : first;
}

}  // namespace taps
