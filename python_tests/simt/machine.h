// What include/cuda_runtime.h asks of simt.cpp. The state is global: one launch runs at a time.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt/vector_types.h"

namespace simt::detail {

// ---- The running thread ----

extern uint3 thread_index;
extern uint3 block_index;
extern dim3 block_extent;
extern dim3 grid_extent;

// ---- Waiting ----

using Place = std::source_location;  // of a barrier or a warp operation in the kernel: the last, default argument

[[noreturn]] void fail(const std::string& sentence);  // with the kernel and the block in front

// Returns the number of threads of the block that passed a predicate.
int wait_for_block(const char* operation, bool predicate, const Place& place);

// What the lanes of a warp bring to an operation and take from it.
struct Lanes {
  uint64_t value[32];
  int source[32];
  uint64_t result[32];
};

// Fills the results of the lanes of the mask. Runs once, when the last of them has arrived.
using Combine = void (*)(Lanes& lanes, unsigned mask);

uint64_t wait_for_lanes(const char* operation, Combine combine, unsigned mask, uint64_t value, int source,
                        const Place& place);

int lane_of_thread();

extern int steps_to_preemption;
void preempt();

// Where another thread may take over in the middle of things. A thread that spins must pass one.
inline void preemption_point() {
  if (--steps_to_preemption <= 0) {
    preempt();
  }
}

// An atomic access, which another thread may come before. Where accesses are watched for races (races.h), the function
// that makes it is not, and says here what it does.
#if defined(__SANITIZE_THREAD__)
#define SIMT_UNWATCHED __attribute__((no_sanitize("thread")))
void record_atomic(const volatile void* address, size_t bytes, bool writes);
#else
#define SIMT_UNWATCHED
inline void record_atomic(const volatile void*, size_t, bool) {}
#endif

template <typename T>
void before_atomic(T* address, bool writes = true) {
  preemption_point();
  record_atomic(address, sizeof(T), writes);
}

// ---- Shared arrays ----

// One declaration of a shared array: a static object, hence one for each instantiation of a template, and the same one
// for all threads, however the function around it is inlined.
struct Site {
  const char* name;
  size_t bytes;
  size_t alignment;
  unsigned char* memory = nullptr;
  uint64_t block = 0;  // whose memory it is
};

extern uint64_t running_block;  // another number for each block: odd in a block, even between blocks
void allocate_shared(Site& site);

inline void* shared_memory(Site& site) {
  if (site.block != running_block) {
    allocate_shared(site);
  }
  return site.memory;
}

void* dynamic_shared_memory();

// ---- Launches ----

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t dynamic_bytes;
};

void run_grid(const Launch& launch, const std::function<void()>& thread);

inline dim3 extent(const char*, const dim3& value) {
  return value;
}

// CUDA cuts a count that has more than 32 bits without a word.
template <std::integral Count>
dim3 extent(const char* kernel, Count count) {
  if (!std::in_range<unsigned>(count)) {
    fail(std::string(kernel) + ": the grid or block of " + std::to_string(count) + " does not fit in 32 bits");
  }
  return dim3(static_cast<unsigned>(count));
}

template <typename Grid, typename Block, typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, Block block, size_t dynamic_bytes, CUstream_st*,
            std::type_identity_t<Parameters>... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "a kernel's parameters are copied as bytes");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel takes at most 4 KB of parameters");
  const std::tuple<Parameters...> copies(arguments...);
  run_grid({name, reinterpret_cast<const void*>(kernel), extent(name, grid), extent(name, block), dynamic_bytes},
           [&] { std::apply(kernel, copies); });
}

}  // namespace simt::detail
