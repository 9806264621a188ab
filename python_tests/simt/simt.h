// A stand-in for the CUDA execution model, so that kernels written for nvcc run, and are tested, on a CPU.
//
// The very same .cu files are compiled by g++ (`-x c++ -Ipython_tests/simt/include -Ipython_tests -Icsrc`):
// include/cuda_runtime.h takes the place of CUDA's, and common/launch.cuh leaves to it the two things that C++ cannot
// spell, launches and shared arrays.
//
// A launch runs its blocks one after the other in the calling host thread. A block is one fiber a thread, each on its
// own stack (fiber.h). A thread runs until it waits, at a barrier or for the other lanes of a warp operation, and hands
// over to the next; a warp is no more than 32 threads that may exchange values, it does not run in lockstep. Whoever
// arrives last computes the result and makes the others ready again. The next thread is always the ready one of the
// lowest rank, so that it runs as far ahead of the others as the barriers allow; ranks follow the order in force:
//
//   forward    threads and blocks from 0 up
//   reverse    from the last one down
//   shuffled   by a seed, drawn anew at every barrier; threads are also interrupted at atomics, fences and warp
//              operations, and blocks come in another order
//
// A result that depends on the order means that a barrier is missing (or that the kernel is not deterministic).
// In any order the stand-in fails the launch, with a std::runtime_error that says where, at
//
//   a barrier that a thread of the block has not reached when it leaves, or that threads reach at different places;
//   a warp operation whose mask lacks its caller, names lanes that have left or do not exist, or whose shuffle reads
//   outside the mask; lanes that wait for each other at different places or with different masks; any other wait for
//   something that cannot come; spinning on atomics for what no thread does;
//   writes past the end of a shared array, static or dynamic (under AddressSanitizer reads too, at the very line);
//   launches that CUDA refuses: empty or too large grids and blocks, too much shared memory;
//   compiled for it (races.h), any access that no barrier separates from another thread's.
//
// Shared arrays start every block as poison, as do new tensors (poison below): NaN as a floating-point number of any
// width, far from zero as an integer. What a stand-in on one host thread cannot show: a missing __threadfence between
// blocks, blocks that overlap in time, local memory and registers, the cost of anything.
//
// A thread that waits costs about 17 ns at a barrier and 24 ns at a shuffle, a thread of a new block 22 ns, so that a
// block of 1,024 threads passes 50 barriers in 0.9 ms (one core of a server of 2023). Launches want small blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

enum class Order { kForward, kReverse, kShuffled };

// Settings of all launches to come, of every host thread; launches themselves are made one at a time.
void set_order(Order order, uint64_t seed = 0);
void set_multiprocessors(int count);            // what cudaDevAttrMultiProcessorCount says
void set_shared_memory_limit(int block_bytes);  // what a block may have at most
void reset();                                   // forward, 132 multiprocessors, 227 KB, counters at zero

struct Counters {
  uint64_t launches = 0;
  uint64_t blocks = 0;
  uint64_t switches = 0;            // from one thread to another
  size_t static_shared_bytes = 0;   // the most that a block of the last launch had
  size_t dynamic_shared_bytes = 0;  // of the last launch
};
Counters counters();

// Fills memory with values that no kernel means to leave there.
void poison(void* memory, size_t bytes);

}  // namespace simt
