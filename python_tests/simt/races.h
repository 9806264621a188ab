// Finds accesses of two threads of a block to the same byte, one of them a write, with no barrier between them,
// whatever order the threads happened to run in. Included by simt.cpp only; off unless everything is compiled, but not
// linked, with -fsanitize=thread --param tsan-distinguish-volatile=1: the compiler then announces every access to the
// functions at the end of this file. Kernels take about 20 times as long.
//
// For each byte of the shared arrays and of the tensors made for the launch it keeps the last write and two reads. They
// come before an access of another thread if a __syncthreads lies between, or, within a warp, a __syncwarp; shuffles
// and votes order nothing in CUDA, and do not here. Two atomics may meet, volatile accesses being such, and two writes
// of the same value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#if defined(__SANITIZE_THREAD__)
#include <sys/mman.h>

namespace simt::detail {

struct Access {
  uint32_t epoch;  // the number of the last barrier before it
  uint16_t sync;   // of the last __syncwarp of its warp
  uint16_t thread : 15;
  uint16_t is_atomic : 1;
};

struct Cell {
  Access write, read, other_read;
};

struct Range {
  uintptr_t begin, end;
  const char* name;
  Cell* cells;
};

// A write that met another one: a race if it changes what is there, which is known once it is done.
struct Doubt {
  const unsigned char* memory;  // null: none
  size_t bytes;
  unsigned char old[4];
  int threads[2];
};

struct Races {
  static constexpr int kMostRanges = 64;
  static constexpr size_t kMostCells = size_t{16} << 20;

  Range ranges[kMostRanges];
  int num_ranges;
  int last_range;  // where the last access was
  Cell* cells;
  size_t num_cells;
  bool has_run;    // since the last tensor was made
  uint32_t epoch;  // starts anew with every block too, so that cells need never be cleared
  uint16_t syncs[32];
  int thread = -1;  // that runs
  Doubt doubt;
  const char* name;  // of the first race found, or null
  size_t offset;
  const char* kinds;
  int threads[2];
};

inline Races races;

// ---- What the scheduler says ----

SIMT_UNWATCHED inline void order_block() {
  ++races.epoch;
}

SIMT_UNWATCHED inline void order_warp(int warp) {
  ++races.syncs[warp];
}

SIMT_UNWATCHED inline void run_thread(int thread) {
  races.thread = thread;
}

SIMT_UNWATCHED inline void watch(const void* memory, size_t bytes, const char* name) {
  if (races.cells == nullptr) {
    races.cells = static_cast<Cell*>(mmap(nullptr, Races::kMostCells * sizeof(Cell), PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  if (races.num_ranges == Races::kMostRanges || bytes > Races::kMostCells - races.num_cells) {
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  races.ranges[races.num_ranges++] = {begin, begin + bytes, name, races.cells + races.num_cells};
  races.num_cells += bytes;
}

// Forgets the ranges from the `count`-th on; the ones before stay.
SIMT_UNWATCHED inline void unwatch(int count) {
  races.num_cells = count == 0 ? 0
                               : static_cast<size_t>(races.ranges[count - 1].cells - races.cells) +
                                     (races.ranges[count - 1].end - races.ranges[count - 1].begin);
  races.num_ranges = count;
  races.doubt.memory = nullptr;
  races.name = nullptr;
  races.has_run = true;
}

// A tensor is watched until the first new one after a launch: so long may a later launch use it.
SIMT_UNWATCHED inline void watch_tensor(const void* memory, size_t bytes) {
  if (races.has_run) {
    unwatch(0);
    races.has_run = false;
  }
  watch(memory, bytes, "a tensor");
}

inline int num_watched() {
  return races.num_ranges;
}

// ---- Looking for races ----

SIMT_UNWATCHED inline bool holds(const Range& range, uintptr_t address) {
  return address - range.begin < range.end - range.begin;
}

SIMT_UNWATCHED inline Range* find_range(uintptr_t address) {
  if (holds(races.ranges[races.last_range], address) && races.last_range < races.num_ranges) {
    return &races.ranges[races.last_range];
  }
  for (int i = races.num_ranges - 1; i >= 0; --i) {
    if (holds(races.ranges[i], address)) {
      races.last_range = i;
      return &races.ranges[i];
    }
  }
  return nullptr;
}

SIMT_UNWATCHED inline void report(uintptr_t address, int first, int second, const char* kinds) {
  const Range* range = find_range(address);
  if (races.name == nullptr && range != nullptr) {
    races.name = range->name;
    races.offset = address - range->begin;
    races.kinds = kinds;
    races.threads[0] = first;
    races.threads[1] = second;
  }
}

SIMT_UNWATCHED inline void settle_doubt() {
  const Doubt doubt = races.doubt;
  races.doubt.memory = nullptr;
  for (size_t i = 0; doubt.memory != nullptr && i < doubt.bytes; ++i) {
    if (doubt.memory[i] != doubt.old[i]) {
      report(reinterpret_cast<uintptr_t>(doubt.memory), doubt.threads[0], doubt.threads[1], "both write");
    }
  }
}

SIMT_UNWATCHED inline void raise_doubt(uintptr_t address, size_t bytes, int other) {
  Doubt& doubt = races.doubt;
  if (doubt.memory == nullptr) {
    doubt = {reinterpret_cast<const unsigned char*>(address), bytes, {}, {other, races.thread}};
    for (size_t i = 0; i < bytes; ++i) {
      doubt.old[i] = doubt.memory[i];
    }
  }
}

SIMT_UNWATCHED inline bool meets(const Access& before, bool is_atomic) {
  const int warp = races.thread / 32;
  return before.epoch == races.epoch && before.thread != races.thread && !(before.is_atomic && is_atomic) &&
         !(before.thread / 32 == warp && before.sync != races.syncs[warp]);
}

SIMT_UNWATCHED inline void check_read(uintptr_t address, Cell& cell, const Access& self) {
  if (meets(cell.write, self.is_atomic)) {
    report(address, cell.write.thread, self.thread, "the one writes, the other reads");
  }
  (meets(cell.read, false) ? cell.other_read : cell.read) = self;
}

SIMT_UNWATCHED inline void check_write(uintptr_t address, size_t bytes, Cell& cell, const Access& self) {
  for (const Access* read : {&cell.read, &cell.other_read}) {
    if (meets(*read, self.is_atomic)) {
      report(address, read->thread, self.thread, "the one reads, the other writes");
    }
  }
  if (meets(cell.write, self.is_atomic)) {
    raise_doubt(address, bytes, cell.write.thread);
  }
  cell.write = self;
}

SIMT_UNWATCHED inline void record_access(const volatile void* memory, size_t bytes, bool writes, bool is_atomic) {
  if (races.thread < 0) {
    return;
  }
  settle_doubt();
  const Access self = {races.epoch, races.syncs[races.thread / 32], static_cast<uint16_t>(races.thread), is_atomic};
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const Range* range = find_range(address);
  const size_t step = address % 4 == 0 && bytes % 4 == 0 ? 4 : 1;  // words are looked at as wholes
  for (size_t i = 0; range != nullptr && i < bytes && address + i < range->end; i += step) {
    Cell& cell = range->cells[address + i - range->begin];
    if (writes) {
      check_write(address + i, step, cell, self);
    } else {
      check_read(address + i, cell, self);
    }
  }
}

// The first race of the block in words, or nothing.
inline std::string race_text() {
  settle_doubt();
  if (races.name == nullptr) {
    return "";
  }
  const std::string text = "threads " + std::to_string(races.threads[0]) + " and " + std::to_string(races.threads[1]) +
                           " race for byte " + std::to_string(races.offset) + " of " + races.name + ": " + races.kinds +
                           ", with no barrier between";
  races.name = nullptr;
  return text;
}

}  // namespace simt::detail

// ---- What the compiler calls ----

#define SIMT_ACCESS(name, bytes, writes, is_atomic)           \
  SIMT_UNWATCHED void __tsan_##name##bytes(void* p) {         \
    simt::detail::record_access(p, bytes, writes, is_atomic); \
  }
#define SIMT_ACCESSES(bytes)                       \
  SIMT_ACCESS(read, bytes, false, false)           \
  SIMT_ACCESS(write, bytes, true, false)           \
  SIMT_ACCESS(unaligned_read, bytes, false, false) \
  SIMT_ACCESS(unaligned_write, bytes, true, false) \
  SIMT_ACCESS(volatile_read, bytes, false, true)   \
  SIMT_ACCESS(volatile_write, bytes, true, true)

// C++ atomics are the host's; they only have to work.
#define SIMT_HOST_RMW(bits, type, name)                                                 \
  SIMT_UNWATCHED type __tsan_atomic##bits##_##name(volatile type* p, type value, int) { \
    return __atomic_##name(p, value, 5);                                                \
  }
#define SIMT_HOST_ATOMICS(bits, type)                                                                              \
  SIMT_UNWATCHED type __tsan_atomic##bits##_load(const volatile type* p, int) {                                    \
    return __atomic_load_n(p, 5);                                                                                  \
  }                                                                                                                \
  SIMT_UNWATCHED void __tsan_atomic##bits##_store(volatile type* p, type value, int) {                             \
    __atomic_store_n(p, value, 5);                                                                                 \
  }                                                                                                                \
  SIMT_UNWATCHED type __tsan_atomic##bits##_exchange(volatile type* p, type value, int) {                          \
    return __atomic_exchange_n(p, value, 5);                                                                       \
  }                                                                                                                \
  SIMT_UNWATCHED bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* seen, type value, int, \
                                                                    int) {                                         \
    return __atomic_compare_exchange_n(p, seen, value, false, 5, 5);                                               \
  }                                                                                                                \
  SIMT_UNWATCHED bool __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* seen, type value, int,   \
                                                                  int) {                                           \
    return __atomic_compare_exchange_n(p, seen, value, false, 5, 5);                                               \
  }                                                                                                                \
  SIMT_HOST_RMW(bits, type, fetch_add)                                                                             \
  SIMT_HOST_RMW(bits, type, fetch_sub)                                                                             \
  SIMT_HOST_RMW(bits, type, fetch_and)                                                                             \
  SIMT_HOST_RMW(bits, type, fetch_or)                                                                              \
  SIMT_HOST_RMW(bits, type, fetch_xor)

#pragma GCC visibility push(hidden)
extern "C" {
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
SIMT_UNWATCHED void __tsan_read_range(void* p, size_t bytes) {
  simt::detail::record_access(p, bytes, false, false);
}
SIMT_UNWATCHED void __tsan_write_range(void* p, size_t bytes) {
  simt::detail::record_access(p, bytes, true, false);
}
SIMT_UNWATCHED void __tsan_vptr_update(void**, void*) {}
SIMT_UNWATCHED void __tsan_vptr_read(void**) {}
SIMT_UNWATCHED void __tsan_func_entry(void*) {}
SIMT_UNWATCHED void __tsan_func_exit() {}
SIMT_UNWATCHED void __tsan_init() {}
SIMT_HOST_ATOMICS(8, unsigned char)
SIMT_HOST_ATOMICS(16, unsigned short)
SIMT_HOST_ATOMICS(32, unsigned)
SIMT_HOST_ATOMICS(64, unsigned long)
SIMT_UNWATCHED void __tsan_atomic_thread_fence(int) {}
SIMT_UNWATCHED void __tsan_atomic_signal_fence(int) {}
}
#pragma GCC visibility pop
#undef SIMT_HOST_ATOMICS
#undef SIMT_HOST_RMW
#undef SIMT_ACCESSES
#undef SIMT_ACCESS

#else

namespace simt::detail {

inline void order_block() {}
inline void order_warp(int) {}
inline void run_thread(int) {}
inline void watch(const void*, size_t, const char*) {}
inline void unwatch(int) {}
inline void watch_tensor(const void*, size_t) {}
inline int num_watched() {
  return 0;
}
inline std::string race_text() {
  return "";
}

}  // namespace simt::detail

#endif
