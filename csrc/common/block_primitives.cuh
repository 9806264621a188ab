// What the threads of a block do together. Every thread of the block calls with the same arguments but for its own
// value, and every thread gets the result. Orders are fixed, so floating-point results never change.
#pragma once

#include <cstdint>

#include "common/launch.cuh"
#include "common/ticket.h"

namespace taps::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarp;
}

template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// combine must be associative and commutative, except for rounding.
template <int kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  static_assert(kThreads % kWarp == 0);
  constexpr int kWarps = kThreads / kWarp;
  value = warp_reduce(value, combine);
  if constexpr (kWarps > 1) {
    TAPS_SHARED(T, partial, kWarps);
    __syncthreads();  // the last call's results may still be being read
    if (lane_index() == 0) {
      partial[warp_index()] = value;
    }
    __syncthreads();
    value = partial[0];
    for (int warp = 1; warp < kWarps; ++warp) {
      value = combine(value, partial[warp]);
    }
  }
  return value;
}

struct Scanned {
  int before;  // the sum over the threads before this one
  int total;   // the sum over all
};

template <int kThreads>
__device__ Scanned block_scan(int value) {
  constexpr int kWarps = kThreads / kWarp;
  int inclusive = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, inclusive, offset);
    inclusive += lane_index() >= offset ? below : 0;
  }
  if constexpr (kWarps == 1) {
    return {inclusive - value, __shfl_sync(kAllLanes, inclusive, kWarp - 1)};
  } else {
    TAPS_SHARED(int, warp_totals, kWarps);
    __syncthreads();
    if (lane_index() == kWarp - 1) {
      warp_totals[warp_index()] = inclusive;
    }
    __syncthreads();
    Scanned scanned{inclusive - value, 0};
    for (int warp = 0; warp < kWarps; ++warp) {
      scanned.before += warp < warp_index() ? warp_totals[warp] : 0;
      scanned.total += warp_totals[warp];
    }
    return scanned;
  }
}

// The k-th smallest (from 0) of key(0), ..., key(count - 1), which are unsigned and 64 bits wide; k < count. A radix
// selection by bytes from the top, which ends when one key is left: distinct keys of a few bytes take a few rounds.
template <int kThreads, typename Key>
__device__ uint64_t kth_smallest(int count, int k, Key key) {
  TAPS_SHARED(int, histogram, 256);
  TAPS_SHARED(int, chosen, 3);  // the byte, how many keys lie below it, how many in it
  TAPS_SHARED(uint64_t, found, 1);
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < 256; bin += kThreads) {
      histogram[bin] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t digits = key(i) >> shift;
      if (digits >> 8 == prefix) {
        atomicAdd(&histogram[digits & 255], 1);
      }
    }
    __syncthreads();
    if (warp_index() == 0) {  // eight bins a lane
      int in_lane = 0;
      for (int bin = lane_index() * 8; bin < lane_index() * 8 + 8; ++bin) {
        in_lane += histogram[bin];
      }
      int below = block_scan<kWarp>(in_lane).before;
      for (int bin = lane_index() * 8; bin < lane_index() * 8 + 8; ++bin) {
        if (below <= k && k < below + histogram[bin]) {
          chosen[0] = bin;
          chosen[1] = below;
          chosen[2] = histogram[bin];
        }
        below += histogram[bin];
      }
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<uint64_t>(chosen[0]);
    k -= chosen[1];
    if (chosen[2] == 1) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        if (key(i) >> shift == prefix) {
          found[0] = key(i);
        }
      }
      __syncthreads();
      return found[0];
    }
  }
  return prefix;
}

// Makes a ticket of uninitialised memory countable. One thread of each block that will call arrives_last calls this,
// best long before: its two trips to memory then cost nothing. If the exchange fails, another block was faster.
__device__ __forceinline__ void ready_ticket(unsigned long long* ticket, uint64_t nonce) {
  const unsigned long long seen = __ldcg(ticket);
  if (seen >> kTicketCountBits != nonce) {
    atomicCAS(ticket, seen, static_cast<unsigned long long>(nonce) << kTicketCountBits);
  }
}

// Whether this block is the last of `total` blocks to call with this ticket; all that the others wrote to global memory
// before is then visible to it. `nonce` is the launch's own (common/ticket.h); `is_ready` says that ready_ticket was
// called already. One addition, not a loop of exchanges: blocks that arrive together would fail all but one at a time.
__device__ inline bool arrives_last(unsigned long long* ticket, uint64_t nonce, int total, bool is_ready = false) {
  TAPS_SHARED(bool, is_last, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (!is_ready) {
      ready_ticket(ticket, nonce);
    }
    const unsigned long long before = atomicAdd(ticket, 1ull) & ((1ull << kTicketCountBits) - 1);
    is_last[0] = before + 1 == static_cast<unsigned long long>(total);
    if (is_last[0]) {
      __threadfence();
      atomicExch(ticket, 0ull);  // for the next replay of a captured launch; after the fence, so nothing waits for it
    }
  }
  __syncthreads();
  return is_last[0];
}

}  // namespace taps::cuda
