// A ticket finds the last of several blocks to finish a common piece of work, in memory that was not cleared.
//
// The usual counter must be zero before the launch: a memset, or a buffer that outlives the call and that two replays
// of captured graphs would share. Here the word holds the launch's nonce above its count. A word with another nonce
// counts as zero, whatever the memory held before, and the last block leaves 0 behind, so that a captured launch, whose
// nonce never changes, finds no trace of its last replay. It is wrong only if stale memory holds this very nonce:
// probability 2^-47.
#pragma once

#include <atomic>
#include <cstdint>
#include <random>

namespace taps {

constexpr int kTicketCountBits = 16;  // at most 65,535 blocks share a ticket

// 48 bits and odd, a new one for each launch of this process.
inline uint64_t launch_nonce() {
  static std::atomic<uint64_t> next{(uint64_t{std::random_device{}()} << 32) | std::random_device{}()};
  uint64_t mixed = next.fetch_add(0x9E3779B97F4A7C15u, std::memory_order_relaxed);
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  return (mixed ^ (mixed >> 31)) >> kTicketCountBits | 1;
}

}  // namespace taps
