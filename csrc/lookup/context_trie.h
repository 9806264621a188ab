// A trie of the contexts in one text: each node is a run of tokens that occurred, its children are the tokens that
// followed it, the newest first. A node is known by its parent and its token, so that no two contexts share one. Adding
// and finding take one look into a hash table, whatever the size of the text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace taps {

class ContextTrie {
 public:
  static constexpr int32_t kRoot = 0;
  static constexpr int32_t kNone = -1;

  struct Node {
    int32_t parent = kNone;
    int32_t token = 0;
    int32_t count = 0;  // how often the run occurred
    int32_t total = 0;  // the sum of its children's counts
    int32_t num_children = 0;
    int32_t newest = kNone;  // child
    int32_t newer = kNone;   // sibling
    int32_t older = kNone;   // sibling
  };

  ContextTrie() : nodes_(1), table_(kFirstTable, kNone) {}

  const Node& operator[](int32_t node) const { return nodes_[node]; }

  size_t num_bytes() const { return nodes_.capacity() * sizeof(Node) + table_.capacity() * sizeof(int32_t); }

  // The child of `parent` for a token, or kNone.
  int32_t find(int32_t parent, int32_t token) const { return table_[slot_of(parent, token)]; }

  // Counts one more occurrence of `token` behind `parent`; returns the child, which is now the newest.
  int32_t add(int32_t parent, int32_t token) {
    const size_t slot = slot_of(parent, token);
    int32_t child = table_[slot];
    if (child == kNone) {
      child = static_cast<int32_t>(nodes_.size());
      nodes_.push_back({.parent = parent, .token = token});
      table_[slot] = child;
      ++nodes_[parent].num_children;
      if (2 * nodes_.size() > table_.size()) {
        grow();
      }
    } else {
      unlink(child);
    }
    link_as_newest(child);
    ++nodes_[child].count;
    ++nodes_[parent].total;
    return child;
  }

 private:
  static constexpr size_t kFirstTable = 1024;  // slots, a power of 2

  // Where the child of `parent` for a token stands in the table, or the free slot where it would stand.
  size_t slot_of(int32_t parent, int32_t token) const {
    const uint64_t key = static_cast<uint64_t>(static_cast<uint32_t>(parent)) << 32 | static_cast<uint32_t>(token);
    const uint64_t mixed = (key ^ key >> 29) * 0x9E3779B97F4A7C15u;
    const size_t last = table_.size() - 1;
    for (size_t slot = static_cast<size_t>(mixed >> 24) & last;; slot = (slot + 1) & last) {
      const int32_t node = table_[slot];
      if (node == kNone || (nodes_[node].parent == parent && nodes_[node].token == token)) {
        return slot;
      }
    }
  }

  void grow() {
    table_.assign(2 * table_.size(), kNone);
    for (size_t node = 1; node < nodes_.size(); ++node) {
      table_[slot_of(nodes_[node].parent, nodes_[node].token)] = static_cast<int32_t>(node);
    }
  }

  void unlink(int32_t child) {
    const Node& node = nodes_[child];
    (node.newer == kNone ? nodes_[node.parent].newest : nodes_[node.newer].older) = node.older;
    if (node.older != kNone) {
      nodes_[node.older].newer = node.newer;
    }
  }

  void link_as_newest(int32_t child) {
    Node& node = nodes_[child];
    node.newer = kNone;
    node.older = std::exchange(nodes_[node.parent].newest, child);
    if (node.older != kNone) {
      nodes_[node.older].newer = child;
    }
  }

  std::vector<Node> nodes_;
  std::vector<int32_t> table_;  // nodes by (parent, token), at most half full
};

}  // namespace taps
