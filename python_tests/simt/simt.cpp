// Launches, settings and the runtime's functions; see simt.h for the rules.
#include "simt/simt.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>

#include "simt/machine.h"
#include "simt/races.h"
#include "simt/shared_arrays.h"
#include "simt/state.h"
#include "simt/turns.h"

namespace simt {

namespace detail {

namespace {

// ---- The life of a block ----

void start_threads() {
  machine.num_threads = static_cast<int>(block_extent.x * block_extent.y * block_extent.z);
  machine.num_left = machine.num_waiting = machine.num_true = machine.steps = 0;
  machine.first_left = nullptr;
  while (static_cast<int>(machine.threads.size()) < machine.num_threads) {
    auto thread = std::make_unique<Thread>();
    thread->fiber.allocate_stack();
    machine.threads.push_back(std::move(thread));
  }
  for (int i = 0; i < machine.num_threads; ++i) {
    Thread& thread = *machine.threads[i];
    const unsigned linear = static_cast<unsigned>(i);
    thread.number = i;
    thread.index = {linear % block_extent.x, linear / block_extent.x % block_extent.y,
                    linear / (block_extent.x * block_extent.y)};
    thread.state = State::kReady;
    thread.fiber.start(enter, static_cast<size_t>(i));
  }
  for (int first = 0; first < machine.num_threads; first += kLanes) {
    const int lanes = std::min(kLanes, machine.num_threads - first);
    Warp& warp = machine.warps[first / kLanes];
    warp.present = 0xFFFFFFFFu >> (kLanes - lanes);
    warp.num_groups = 0;
  }
  deal_ranks();
}

void run_threads() {
  machine.error = nullptr;
  make_current(*machine.by_rank[machine.ready.first()]);
  machine.host.switch_to(machine.current->fiber);
  machine.current = nullptr;
  run_thread(-1);
  if (machine.error != nullptr) {
    for (int i = 0; i < machine.num_threads; ++i) {
      machine.threads[i]->fiber.forget_frames();
    }
    std::rethrow_exception(std::exchange(machine.error, nullptr));
  }
}

void run_block(uint64_t linear) {
  struct Memory {  // freed on the way out, by an error too
    int num_tensors = num_watched();
    ~Memory() {
      ++running_block;
      unwatch(num_tensors);
      free_shared();
    }
  } memory;
  block_index.x = static_cast<unsigned>(linear % grid_extent.x);
  block_index.y = static_cast<unsigned>(linear / grid_extent.x % grid_extent.y);
  block_index.z = static_cast<unsigned>(linear / grid_extent.x / grid_extent.y);
  ++running_block;
  order_block();
  ++machine.counters.blocks;
  machine.static_bytes = 0;
  machine.dynamic_memory = add_shared("of the launch", machine.launch->dynamic_bytes, 16);
  start_threads();
  run_threads();
  check_shared();
  if (const std::string race = race_text(); !race.empty()) {
    fail(race);
  }
}

// ---- The launch ----

uint64_t num_blocks() {
  return uint64_t{grid_extent.x} * grid_extent.y * grid_extent.z;
}

// Blocks in the order in force; shuffled, from some block on in steps prime to their number.
void run_blocks() {
  const uint64_t count = num_blocks();
  uint64_t start = 0;
  uint64_t step = 1;
  if (machine.order == Order::kReverse) {
    start = step = count - 1;
  } else if (machine.order == Order::kShuffled) {
    start = next_random() % count;
    do {
      step = 1 + next_random() % count;
    } while (std::gcd(step, count) != 1);
  }
  for (uint64_t done = 0, block = start; done < count; ++done, block = (block + step) % count) {
    run_block(block);
  }
}

void check_launch(const Launch& launch) {
  const dim3& grid = launch.grid;
  const dim3& block = launch.block;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    fail("the grid is " + text_of(grid) + ", and must lie in 1..(2147483647, 65535, 65535)");
  }
  if (block.x < 1 || block.y < 1 || block.z < 1 || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 ||
      block.x * block.y * block.z > kMaxThreads) {
    fail("the block is " + text_of(block) + ", and must have 1..1024 threads");
  }
  const auto raised = machine.dynamic_limits.find(launch.kernel);
  const size_t limit = raised == machine.dynamic_limits.end() ? kDefaultShared : raised->second;
  if (launch.dynamic_bytes > std::min(limit, machine.shared_limit)) {
    fail(std::to_string(launch.dynamic_bytes) + " bytes of dynamic shared memory, of " +
         std::to_string(std::min(limit, machine.shared_limit)) + " (cudaFuncSetAttribute raises 49152 to the limit)");
  }
}

}  // namespace

void run_grid(const Launch& launch, const std::function<void()>& thread) {
  if (is_launching) {
    fail("a kernel cannot launch a kernel");
  }
  const std::lock_guard lock(launching);
  struct Launching {
    Launching() { is_launching = true; }
    ~Launching() { is_launching = false; }
  } mark;
  machine.launch = &launch;
  machine.body = &thread;
  check_launch(launch);
  ++machine.counters.launches;
  machine.counters.static_shared_bytes = 0;
  machine.counters.dynamic_shared_bytes = launch.dynamic_bytes;
  grid_extent = launch.grid;
  block_extent = launch.block;
  run_blocks();
}

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes) {
  const std::lock_guard lock(launching);
  if (bytes < 0 || static_cast<size_t>(bytes) > machine.shared_limit) {
    return last_error = cudaErrorInvalidValue;
  }
  machine.dynamic_limits[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

}  // namespace detail

using detail::launching;
using detail::machine;

void set_order(Order order, uint64_t seed) {
  const std::lock_guard lock(launching);
  machine.order = order;
  machine.seed = machine.random = seed;
}

void set_multiprocessors(int count) {
  const std::lock_guard lock(launching);
  machine.multiprocessors = count;
}

void set_shared_memory_limit(int block_bytes) {
  const std::lock_guard lock(launching);
  machine.shared_limit = static_cast<size_t>(block_bytes);
}

void reset() {
  set_order(Order::kForward);
  set_multiprocessors(132);
  set_shared_memory_limit(227 << 10);
  const std::lock_guard lock(launching);
  machine.counters = {};
}

Counters counters() {
  const std::lock_guard lock(launching);
  return machine.counters;
}

void poison(void* memory, size_t bytes) {
  detail::fill_with_poison(memory, bytes);
  const std::lock_guard lock(launching);
  detail::watch_tensor(memory, bytes);
}

}  // namespace simt

// ---- The runtime's functions ----

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

cudaError_t cudaGetLastError() {
  return std::exchange(simt::detail::last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  return simt::detail::last_error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::lock_guard lock(simt::detail::launching);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = simt::detail::kMaxThreads;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(simt::detail::kDefaultShared);
      break;
    case cudaDevAttrWarpSize:
      *value = simt::detail::kLanes;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = simt::detail::machine.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(simt::detail::machine.shared_limit);
      break;
    default:
      return simt::detail::last_error = cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
