// What the stand-in knows of the launch, the block and the threads in hand, and words for it. Included by simt.cpp
// only, like its other headers: one file to compile, so that a kernel can be tried with a single g++ command.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt/fiber.h"
#include "simt/machine.h"
#include "simt/simt.h"

namespace simt::detail {

uint3 thread_index;
uint3 block_index;
dim3 block_extent;
dim3 grid_extent;
int steps_to_preemption;
uint64_t running_block = 2;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;
constexpr size_t kDefaultShared = 48 << 10;
constexpr int kStretch = 1 << 16;  // of atomics that a thread may make at a time: it may be waiting for another one
constexpr int kShuffledStretch = 16;
constexpr int kMostSteps = 1 << 24;  // that a block may make while no thread waits or leaves

enum class State { kReady, kAtBarrier, kInWarp, kLeft };

struct Thread {
  Fiber fiber;
  int number;  // in the block
  uint3 index;
  State state;
  const char* operation;  // what it waits in, and where
  Place place;
  int rank;
};

// Lanes of a warp that wait for each other.
struct Group {
  unsigned mask;
  unsigned arrived;
  int first;  // who came first
  Combine combine;
};

struct Warp {
  Lanes lanes;
  unsigned present;  // lanes that exist and have not left
  int num_groups;
  Group groups[kLanes];
};

// The ready threads by rank: one bit each, and one bit for each word that is not zero.
struct ReadySet {
  std::array<uint64_t, kMaxThreads / 64> words{};
  unsigned summary = 0;

  void insert(int rank) {
    words[rank / 64] |= uint64_t{1} << rank % 64;
    summary |= 1u << rank / 64;
  }
  void erase(int rank) {
    words[rank / 64] &= ~(uint64_t{1} << rank % 64);
    if (words[rank / 64] == 0) {
      summary &= ~(1u << rank / 64);
    }
  }
  bool empty() const { return summary == 0; }
  int first() const {
    const int word = std::countr_zero(summary);
    return word * 64 + std::countr_zero(words[word]);
  }
  int first_after(int rank) const {  // cyclic
    const int word = rank / 64;
    const uint64_t above = words[word] & ~(~uint64_t{0} >> (63 - rank % 64));
    if (above != 0) {
      return word * 64 + std::countr_zero(above);
    }
    const unsigned later = summary & ~(~0u >> (31 - word));
    if (later == 0) {
      return first();
    }
    const int next = std::countr_zero(later);
    return next * 64 + std::countr_zero(words[next]);
  }
};

// A piece of shared memory with canaries around it.
struct SharedMemory {
  const char* name;
  size_t bytes;
  unsigned char* memory;
};

struct Machine {
  // Settings.
  Order order = Order::kForward;
  uint64_t seed = 0;
  uint64_t random = 0;
  int multiprocessors = 132;
  size_t shared_limit = 227 << 10;
  std::map<const void*, size_t> dynamic_limits;
  Counters counters;

  // The launch.
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  Fiber host;

  // The block.
  int num_threads = 0;
  int num_left = 0;
  int num_waiting = 0;  // at the barrier
  int num_true = 0;
  int barrier_result = 0;
  int steps = 0;
  Thread* current = nullptr;
  Thread* first_left = nullptr;
  Thread* first_waiting = nullptr;
  ReadySet ready;
  std::exception_ptr error;
  std::vector<std::unique_ptr<Thread>> threads;
  std::array<Thread*, kMaxThreads> by_rank;
  std::array<Warp, kMaxThreads / kLanes> warps;
  std::vector<SharedMemory> shared;
  unsigned char* dynamic_memory = nullptr;
  size_t static_bytes = 0;
};

Machine machine;
std::mutex launching;
thread_local bool is_launching = false;  // this host thread, so that what the machine holds is its own
thread_local cudaError_t last_error = cudaSuccess;

// SplitMix64.
uint64_t next_random() {
  uint64_t mixed = machine.random += 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  return mixed ^ (mixed >> 31);
}

int random_below(int count) {
  return static_cast<int>((next_random() >> 32) * static_cast<uint64_t>(count) >> 32);
}

// ---- Words for errors ----

std::string text_of(const uint3& index, const dim3& extent) {
  std::string text = std::to_string(index.x);
  if (extent.y > 1 || extent.z > 1) {
    text = "(" + text + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
  }
  return text;
}

std::string text_of(const dim3& extent) {
  return "(" + std::to_string(extent.x) + ", " + std::to_string(extent.y) + ", " + std::to_string(extent.z) + ")";
}

std::string text_of(const Thread& thread) {
  return "thread " + text_of(thread.index, block_extent);
}

std::string text_of(const char* operation, const Place& place) {
  const std::string file = place.file_name();
  return std::string(operation) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line()) + ")";
}

std::string waiting_text(const Thread& thread) {
  return text_of(thread) + " waits at " + text_of(thread.operation, thread.place);
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08X", mask);
  return text;
}

bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Who waits where, for when nobody can go on: one line for each place, with its first thread.
std::string who_waits() {
  std::vector<std::pair<const Thread*, int>> places;
  for (int i = 0; i < machine.num_threads; ++i) {
    const Thread& thread = *machine.threads[i];
    if (thread.state == State::kLeft) {
      continue;
    }
    const auto known = std::find_if(places.begin(), places.end(),
                                    [&](const auto& place) { return same_place(place.first->place, thread.place); });
    if (known == places.end()) {
      places.emplace_back(&thread, 1);
    } else {
      ++known->second;
    }
  }
  std::string text;
  for (const auto& [thread, count] : places) {
    text += text.empty() ? "" : "; ";
    text += waiting_text(*thread);
    text += count > 1 ? ", with " + std::to_string(count - 1) + " more" : "";
  }
  return text;
}

}  // namespace

void fail(const std::string& sentence) {
  std::string text;
  if (is_launching) {
    text = machine.launch->name;
    if (text.starts_with('(')) {
      text = text.substr(1, text.size() - 2);  // a template's arguments need them in a macro
    }
    if (running_block % 2 == 1) {
      text += ", block " + text_of(block_index, grid_extent);
    }
    text += machine.order == Order::kShuffled ? " (order shuffled by " + std::to_string(machine.seed) + "): " : ": ";
  }
  throw std::runtime_error(text + sentence);
}

}  // namespace simt::detail
