// The shared arrays of a block: made when the first thread comes by, freed with the block.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "simt/races.h"
#include "simt/state.h"

namespace simt::detail {

namespace {

#if defined(SIMT_ASAN)
constexpr size_t kMargin = 0;  // AddressSanitizer has its own
#else
constexpr size_t kMargin = 1024;  // canaries on either side
#endif
constexpr unsigned char kCanaryByte = 0xC9;

// 0xFFF5 or, so that a maximum is as wrong as a minimum, 0x7FF5 in all 16-bit pieces: NaN in bfloat16, half, float and
// double, and far from zero as an integer.
void fill_with_poison(void* memory, size_t bytes) {
  const unsigned char high = machine.order == Order::kReverse ? 0x7F : 0xFF;
  auto* byte = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < bytes; ++i) {
    byte[i] = i % 2 == 0 ? 0xF5 : high;
  }
}

unsigned char* add_shared(const char* name, size_t bytes, size_t alignment) {
  void* memory = nullptr;
  alignment = std::max<size_t>(alignment, 16);
  if (alignment > 1024 || posix_memalign(&memory, alignment, bytes + 2 * kMargin) != 0) {
    fail(std::string("no memory for the shared array ") + name);
  }
  auto* start = static_cast<unsigned char*>(memory) + kMargin;
  std::memset(start - kMargin, kCanaryByte, kMargin);
  std::memset(start + bytes, kCanaryByte, kMargin);
  fill_with_poison(start, bytes);
  machine.shared.push_back({name, bytes, start});
  watch(start, bytes, name);
  return start;
}

bool is_intact(const SharedMemory& array) {
  const auto are_canaries = [](const unsigned char* bytes) {
    return std::all_of(bytes, bytes + kMargin, [](unsigned char byte) { return byte == kCanaryByte; });
  };
  return are_canaries(array.memory - kMargin) && are_canaries(array.memory + array.bytes);
}

void check_shared() {
  for (const SharedMemory& array : machine.shared) {
    if (!is_intact(array)) {
      fail("a thread wrote outside the shared array " + std::string(array.name) + " of " + std::to_string(array.bytes) +
           " bytes");
    }
  }
}

void free_shared() {
  for (const SharedMemory& array : machine.shared) {
    std::free(array.memory - kMargin);
  }
  machine.shared.clear();
  machine.dynamic_memory = nullptr;
}

}  // namespace

void allocate_shared(Site& site) {
  if (machine.current == nullptr) {
    fail(std::string("the shared array ") + site.name + " is used outside a kernel");
  }
  machine.static_bytes += site.bytes;
  Counters& counters = machine.counters;
  counters.static_shared_bytes = std::max(counters.static_shared_bytes, machine.static_bytes);
  const bool is_raised = machine.dynamic_limits.contains(machine.launch->kernel);
  const size_t limit = is_raised ? machine.shared_limit : std::min(kDefaultShared, machine.shared_limit);
  if (machine.static_bytes > kDefaultShared || machine.static_bytes + machine.launch->dynamic_bytes > limit) {
    fail(std::to_string(machine.static_bytes) + " bytes of static shared memory, with " + site.name + ", and " +
         std::to_string(machine.launch->dynamic_bytes) + " of dynamic, of " + std::to_string(limit));
  }
  site.memory = add_shared(site.name, site.bytes, site.alignment);
  site.block = running_block;
}

void* dynamic_shared_memory() {
  return machine.dynamic_memory;
}

}  // namespace simt::detail
