// How probably the next token is one that followed a context before: the logistic sum of four small tables, fitted to
// greedy texts of a language model by benchmarks/lookup_table.py, and the weights of the tokens among themselves.
#pragma once

#include <cmath>
#include <cstdint>

namespace taps {

constexpr int kLengthGroups = 6;  // of contexts of 1, 2, 3, 4, 5 to 6, and 7 or more tokens
constexpr float kByLength[kLengthGroups] = {-1.16f, -0.28f, -0.07f, -0.01f, 0.51f, 1.11f};
constexpr float kByTotal[] = {-1.42f, -0.80f, 0.00f, 0.66f, 1.66f};  // occurrences: 1, 2, 3 to 4, 5 to 8, more
constexpr float kByChildren[] = {1.23f, 0.08f, -0.41f, -0.79f};      // different next tokens: 1, 2, 3 to 4, more
constexpr float kByMisses[] = {0.78f, -0.09f, -0.59f};               // longer contexts that missed: 0, 1, more
constexpr float kStoreOffset = -1.1f;                                // of contexts in other texts than the row's own

inline int length_group(int length) {
  return length <= 4 ? length - 1 : length <= 6 ? 4 : 5;
}

// The group of a count: 1, 2, 3 to 4, 5 to 8, ..., at most `most`.
inline int count_group(int32_t count, int most) {
  int group = 0;
  for (int32_t end = 1; end < count && group < most; end *= 2) {
    ++group;
  }
  return group;
}

inline float hit_logit(int length, int32_t total, int32_t num_children, int num_misses) {
  return kByLength[length_group(length)] + kByTotal[count_group(total, 4)] + kByChildren[count_group(num_children, 3)] +
         kByMisses[num_misses < 2 ? num_misses : 2];
}

// Of the tokens that followed a context, in proportion: the square root of the count, and more for the newest.
inline float continuation_weight(int32_t count, bool is_newest) {
  constexpr float kNewest = 1.28f;
  return std::sqrt(static_cast<float>(count)) * (is_newest ? kNewest : 1.0f);
}

}  // namespace taps
