// Kernels with one defect each, and kernels without, to try the host stand-in for CUDA on (test_simt.py). The program
// runs all of them, or those named, in the given order and prints a line for each: what came out, or the error.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/block_primitives.cuh"

namespace {

using taps::cuda::arrives_last;
using taps::cuda::block_reduce;
using taps::cuda::block_scan;
using taps::cuda::kAllLanes;
using taps::cuda::kth_smallest;
using taps::cuda::lane_index;

struct Plus {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// ---- Right ----

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sums(const float* in, int count, float* out) {
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    sum += in[i];
  }
  const float all = block_reduce<kThreads>(sum, Plus{});
  const float again = block_reduce<kThreads>(all / kThreads, Plus{});
  out[threadIdx.x] = again;
}

template <int kThreads>
__global__ void scans(int* out) {
  const auto scanned = block_scan<kThreads>(threadIdx.x % 7);
  out[threadIdx.x] = scanned.before * 1000 + scanned.total;
}

__global__ void selects(const uint64_t* keys, int count, int k, uint64_t* out) {
  const uint64_t found = kth_smallest<64>(count, k, [&](int i) { return keys[i]; });
  if (threadIdx.x == 0) {
    *out = found;
  }
}

__global__ void sums_of_blocks(int* sums_of_block, unsigned long long* ticket, uint64_t nonce, int* out) {
  const int sum = block_reduce<64>(static_cast<int>(blockIdx.x + threadIdx.x), Plus{});
  if (threadIdx.x == 0) {
    sums_of_block[blockIdx.x] = sum;
  }
  if (arrives_last(ticket, nonce, gridDim.x)) {
    int all = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += 64) {
      all += __ldcg(&sums_of_block[i]);
    }
    all = block_reduce<64>(all, Plus{});
    if (threadIdx.x == 0) {
      *out += all;
    }
  }
}

__global__ void indices(int* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

__device__ void expect(int* wrong, bool holds, int line) {
  if (!holds) {
    atomicExch(wrong, line);
  }
}

__global__ void warp_operations(int* wrong) {
  const int lane = lane_index();
  const double real = lane + 0.5;
  const long long wide = lane - (1ll << 40);
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  expect(wrong, __shfl_sync(kAllLanes, real, 5) == 5.5, __LINE__);
  expect(wrong, __shfl_sync(kAllLanes, lane, 11, 8) == lane / 8 * 8 + 3, __LINE__);
  expect(wrong, __shfl_up_sync(kAllLanes, wide, 3) == (lane < 3 ? wide : wide - 3), __LINE__);
  expect(wrong, __shfl_down_sync(kAllLanes, lane, 1, 4) == (lane % 4 == 3 ? lane : lane + 1), __LINE__);
  expect(wrong, __shfl_xor_sync(kAllLanes, 2.0f * lane, 9) == 2.0f * (lane ^ 9), __LINE__);
  expect(wrong, __shfl_sync(half, lane, lane < 16 ? 2 : 30) == (lane < 16 ? 2 : 30), __LINE__);
  expect(wrong, __ballot_sync(kAllLanes, lane % 3 == 0) == 0x49249249u, __LINE__);
  expect(wrong, __any_sync(half, lane == 20) == (lane >= 16), __LINE__);
  expect(wrong, __all_sync(half, lane != 20) == (lane < 16), __LINE__);
  expect(wrong, __match_any_sync(kAllLanes, lane / 30) == (lane < 30 ? 0x3FFFFFFFu : 0xC0000000u), __LINE__);
  expect(wrong, __reduce_add_sync(kAllLanes, static_cast<unsigned>(lane)) == 496, __LINE__);
  expect(wrong, __reduce_max_sync(half, lane) == (lane < 16 ? 15 : 31), __LINE__);
  expect(wrong, __reduce_min_sync(kAllLanes, lane - 9) == -9, __LINE__);
  expect(wrong, __reduce_or_sync(kAllLanes, 1u << lane) == kAllLanes, __LINE__);
  if (lane % 2 == 0) {
    expect(wrong, __shfl_xor_sync(0x55555555u, lane, 2) == (lane ^ 2), __LINE__);
  } else {
    expect(wrong, __shfl_xor_sync(0xAAAAAAAAu, lane, 4) == (lane ^ 4), __LINE__);
  }
  __syncwarp();
}

__global__ void block_votes(int* wrong) {
  const int thread = threadIdx.x;
  for (int i = 0; i < 50; ++i) {
    expect(wrong, __syncthreads_count(thread < i) == i, __LINE__);
    expect(wrong, __syncthreads_or(thread == 99 - i) == 1, __LINE__);
    expect(wrong, __syncthreads_and(thread != 50 + i) == 0, __LINE__);
    expect(wrong, __syncthreads_and(thread < 100) == 1, __LINE__);
  }
}

__global__ void atomics(int* words, unsigned long long* wide) {
  const int thread = threadIdx.x;
  atomicAdd(&words[0], thread);
  atomicMin(&words[1], -thread);
  atomicMax(&words[2], thread);
  atomicOr(&words[3], 1 << thread % 30);
  atomicAnd(&words[4], ~(1 << thread % 30));
  atomicXor(&words[5], thread);
  atomicSub(&words[6], 1);
  atomicAdd(wide, 1ull << 32);
  int held = words[7];
  for (int seen = held - 1; seen != held;) {  // an addition by hand
    seen = held;
    held = atomicCAS(&words[7], seen, seen + 2);
  }
}

__global__ void intrinsics(int* wrong) {
  expect(wrong, __popc(0xF0u) == 4 && __popcll(~0ull) == 64, __LINE__);
  expect(wrong, __clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63, __LINE__);
  expect(wrong, __ffs(8) == 4 && __ffs(0) == 0 && __ffsll(1ll << 40) == 41, __LINE__);
  expect(wrong, __umulhi(0x80000000u, 6) == 3 && __umul64hi(1ull << 63, 6) == 3, __LINE__);
  expect(wrong, __float_as_uint(1.0f) == 0x3F800000u && __uint_as_float(0x3F800000u) == 1.0f, __LINE__);
  expect(wrong, __float_as_int(-0.0f) < 0 && __int_as_float(0) == 0.0f, __LINE__);
  expect(wrong, __longlong_as_double(__double_as_longlong(1.5)) == 1.5, __LINE__);
  expect(wrong, min(1, 2) == 1 && max(1.0f, 2.0f) == 2.0f && fmaxf(1, NAN) == 1 && isnan(NAN), __LINE__);
  const uint4 four = make_uint4(1, 2, 3, 4);
  expect(wrong, four.w == 4 && sizeof(uint4) == 16 && alignof(float2) == 8 && alignof(longlong2) == 16, __LINE__);
  expect(wrong, warpSize == 32 && __ldg(wrong) == __ldcg(wrong), __LINE__);
}

__global__ void reverses(int count, int* out) {
  TAPS_DYNAMIC_SHARED(int, values);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    values[i] = i;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = values[count - 1 - i];
  }
}

template <int kCount>
struct Parameters {
  int values[kCount];
};

template <int kCount>
__global__ void takes_parameters(Parameters<kCount> parameters, int* out) {
  const int i = threadIdx.x % kCount;
  atomicAdd(out, parameters.values[i]);
}

__global__ void writes_the_same(int* out) {
  TAPS_SHARED(int, found, 1);
  if (threadIdx.x >= 60) {
    found[0] = 256;
  }
  __syncthreads();
  out[threadIdx.x] = found[0];
}

__global__ void rotates_in_warp(int* out) {
  TAPS_SHARED(int, values, 64);
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = threadIdx.x + round;
    __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 31];
    __syncwarp();
  }
}

__global__ void reads_volatile(int* out) {
  TAPS_SHARED(int, least, 1);
  least[0] = 1000;
  __syncthreads();
  if (*const_cast<volatile int*>(least) > static_cast<int>(threadIdx.x)) {  // no more than a hint
    atomicMin(&least[0], threadIdx.x);
  }
  __syncthreads();
  out[threadIdx.x] = least[0];
}

// ---- Wrong ----

__global__ void lacks_barrier(int* out) {
  TAPS_SHARED(int, values, 64);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void lacks_barrier_below(int* out) {
  TAPS_SHARED(int, values, 64);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = threadIdx.x == 0 ? 0 : values[threadIdx.x - 1];
}

// Every thread reads what is there, whoever came last.
__global__ void writes_different(int* out) {
  TAPS_SHARED(int, winner, 1);
  winner[0] = threadIdx.x * 256;
  __syncthreads();
  out[threadIdx.x] = winner[0];
}

__global__ void lacks_barrier_after_atomics(int* out) {
  TAPS_SHARED(int, count, 1);
  count[0] = 0;
  __syncthreads();
  atomicAdd(&count[0], 1);
  out[threadIdx.x] = count[0];
}

// The second sum overwrites what a slower warp still reads of the first.
__global__ void lacks_second_barrier(int* out) {
  TAPS_SHARED(int, partial, 4);
  int sums[2];
  for (int round = 0; round < 2; ++round) {
    const int in_warp = taps::cuda::warp_reduce(static_cast<int>(threadIdx.x) + round, Plus{});
    if (lane_index() == 0) {
      partial[threadIdx.x / 32] = in_warp;
    }
    __syncthreads();
    sums[round] = partial[0] + partial[1] + partial[2] + partial[3];
  }
  out[threadIdx.x] = sums[0] * 10 + sums[1];
}

__global__ void lacks_syncwarp(int* out) {
  TAPS_SHARED(int, values, 32);
  values[31 - threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[threadIdx.x];
}

// Two threads may see the same value before either has written.
__global__ void lacks_atomic(int* out) {
  const int seen = *out;
  __threadfence();
  *out = seen + 1;
}

__global__ void returns_before_barrier() {
  if (threadIdx.x == 40) {
    return;
  }
  __syncthreads();
}

__global__ void has_two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void returns_before_shuffle(int* out) {
  if (threadIdx.x == 7) {
    return;
  }
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
}

__global__ void names_missing_lanes(int* out) {
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);  // of a block of 48
}

__global__ void lacks_itself() {
  __syncwarp(0x0000FFFFu);
}

__global__ void disagrees_on_mask() {
  if (threadIdx.x % 2 == 0) {
    __syncwarp(kAllLanes);
  } else {
    __syncwarp(0xFFFF0000u | 1u << threadIdx.x);
  }
}

__global__ void disagrees_on_operation(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __any_sync(kAllLanes, 1) : __all_sync(kAllLanes, 1);
}

__global__ void reads_outside_mask(int* out) {
  if (threadIdx.x < 8) {
    out[threadIdx.x] = __shfl_down_sync(0x000000FFu, 1, 4);
  }
}

__global__ void waits_for_each_other() {
  if (threadIdx.x == 5) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void spins(int* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}

__global__ void writes_past_shared(int by) {
  TAPS_SHARED(short, before, 3);
  TAPS_SHARED(short, values, 3);
  before[0] = 0;
  short* const start = values;
  start[by] = before[0] + 1;
}

__global__ void writes_past_dynamic_shared(int count) {
  TAPS_DYNAMIC_SHARED(unsigned char, values);
  values[count] = 1;
}

__global__ void reads_past_shared(int by, int* out) {
  TAPS_SHARED(int, values, 5);
  int* const start = values;
  *out = start[by];
}

__global__ void reads_unwritten_shared(double* out) {
  TAPS_SHARED(float, number, 2);
  TAPS_SHARED(double, wide, 1);
  TAPS_SHARED(int, index, 1);
  out[0] = number[1];
  out[1] = wide[0];
  out[2] = index[0];
}

__global__ void has_large_shared(int* out) {
  TAPS_SHARED(int, large, 8192);
  TAPS_SHARED(int, more, 4000);
  large[threadIdx.x] = 1;
  more[threadIdx.x] = 2;
  __syncthreads();
  *out = large[0] + more[0];
}

__global__ void does_nothing(int) {}

// ---- The program ----

using Case = std::function<std::string()>;

#if defined(__CUDACC__)
namespace simt {
void poison(void*, size_t) {}
}  // namespace simt
#endif

std::string text(const std::vector<int>& values) {
  std::string all;
  for (const int value : values) {
    all += all.empty() ? "" : " ";
    all += std::to_string(value);
  }
  return all;
}

template <int kThreads>
std::string sum_and_scan() {
  std::vector<float> in(1000);
  for (int i = 0; i < 1000; ++i) {
    in[i] = static_cast<float>(i);
  }
  std::vector<float> out(kThreads, -1);
  TAPS_LAUNCH((sums<kThreads>), 1, kThreads, 0, nullptr, in.data(), 1000, out.data());
  std::vector<int> scanned(kThreads, -1);
  TAPS_LAUNCH((scans<kThreads>), 1, kThreads, 0, nullptr, scanned.data());
  int wrong = 0;
  int before = 0;
  int total = 0;
  for (int i = 0; i < kThreads; ++i) {
    total += i % 7;
  }
  for (int i = 0; i < kThreads; ++i) {
    wrong += out[i] != 499500.0f || scanned[i] != before * 1000 + total;
    before += i % 7;
  }
  return std::to_string(wrong);
}

std::string select() {
  std::vector<uint64_t> keys;
  for (uint64_t i = 0; i < 300; ++i) {
    keys.push_back(i * 7919 % 300 * 0x0123456789ABCDull);
  }
  uint64_t found = 0;
  TAPS_LAUNCH(selects, 1, 64, 0, nullptr, keys.data(), 300, 123, &found);
  return std::to_string(found / 0x0123456789ABCDull);
}

std::string last_block() {
  std::vector<int> of_block(9, -1);
  unsigned long long ticket = 12345;
  int out = 0;
  for (int replay = 0; replay < 2; ++replay) {
    TAPS_LAUNCH(sums_of_blocks, 9, 64, 0, nullptr, of_block.data(), &ticket, uint64_t{77}, &out);
  }
  return std::to_string(out);
}

std::string count_indices() {
  std::vector<int> out(2 * 3 * 4 * 5 * 6 * 7, 0);
  TAPS_LAUNCH(indices, dim3(2, 3, 4), dim3(5, 6, 7), 0, nullptr, out.data());
  return std::to_string(std::count(out.begin(), out.end(), 1));
}

std::string all_atomics() {
  std::vector<int> words = {0, 0, 0, 0, -1, 0, 0, 0};
  unsigned long long wide = 5;
  TAPS_LAUNCH(atomics, 2, 96, 0, nullptr, words.data(), &wide);
  words.push_back(static_cast<int>(wide >> 32));
  return text(words);
}

std::string reverse(int count, int threads) {
  std::vector<int> out(count, -1);
  const int bytes = count * static_cast<int>(sizeof(int));
  if (bytes > 48 * 1024) {
    cudaFuncSetAttribute(reverses, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  TAPS_LAUNCH(reverses, 1, threads, bytes, nullptr, count, out.data());
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    wrong += out[i] != count - 1 - i;
  }
  return std::to_string(wrong);
}

// What a kernel of one argument left in a few integers.
template <typename Kernel>
Case words(Kernel kernel, int threads, int count) {
  return [=] {
    std::vector<int> out(count);
    simt::poison(out.data(), count * sizeof(int));  // as the ops' outputs are, so that accesses are looked at
    std::fill(out.begin(), out.end(), 0);
    TAPS_LAUNCH(kernel, 1, threads, 0, nullptr, out.data());
    return text(out);
  };
}

template <typename Kernel, typename... Arguments>
Case launch(Kernel kernel, long grid, int block, int shared_bytes, Arguments... arguments) {
  return [=] {
    TAPS_LAUNCH(kernel, grid, block, shared_bytes, nullptr, arguments...);
    return std::string("nothing");
  };
}

std::string unwritten() {
  double out[3] = {};
  TAPS_LAUNCH(reads_unwritten_shared, 1, 1, 0, nullptr, out);
  return std::to_string(out[0] != out[0]) + std::to_string(out[1] != out[1]) +
         std::to_string(out[2] < -600000 || out[2] > 1000000);
}

template <int kCount>
int parameters_of() {
  Parameters<kCount> parameters;
  std::fill_n(parameters.values, kCount, 1);
  int out = 0;
  TAPS_LAUNCH((takes_parameters<kCount>), 2, kCount, 0, nullptr, parameters, &out);
  return out;
}

// On stacks that other kernels have left, at places of all kinds.
std::string parameters() {
  return std::to_string(parameters_of<1>() + parameters_of<8>() + parameters_of<12>() + parameters_of<16>() +
                        parameters_of<20>() + parameters_of<64>() + parameters_of<400>());
}

int word = 0;

const std::map<std::string, Case> kCases = {
    {"sums 32", sum_and_scan<32>},
    {"sums 64", sum_and_scan<64>},
    {"sums 1024", sum_and_scan<1024>},
    {"select", select},
    {"last block", last_block},
    {"indices", count_indices},
    {"warp operations", words(warp_operations, 64, 1)},
    {"block votes", words(block_votes, 100, 1)},
    {"atomics", all_atomics},
    {"intrinsics", words(intrinsics, 1, 1)},
    {"parameters", parameters},
    {"dynamic shared", [] { return reverse(1000, 96) + reverse(20000, 33); }},
    {"writes the same", words(writes_the_same, 64, 64)},
    {"rotates in warp", words(rotates_in_warp, 64, 64)},
    {"lacks barrier below", words(lacks_barrier_below, 64, 64)},
    {"reads volatile", words(reads_volatile, 64, 64)},
    {"writes different", words(writes_different, 64, 64)},
    {"lacks barrier after atomics", words(lacks_barrier_after_atomics, 64, 64)},
    {"lacks barrier", words(lacks_barrier, 64, 64)},
    {"lacks second barrier", words(lacks_second_barrier, 128, 128)},
    {"lacks syncwarp", words(lacks_syncwarp, 32, 32)},
    {"lacks atomic", words(lacks_atomic, 64, 1)},
    {"returns before barrier", launch(returns_before_barrier, 1, 64, 0)},
    {"has two barriers", launch(has_two_barriers, 1, 64, 0)},
    {"returns before shuffle", words(returns_before_shuffle, 32, 32)},
    {"names missing lanes", words(names_missing_lanes, 48, 48)},
    {"lacks itself", launch(lacks_itself, 1, 32, 0)},
    {"disagrees on mask", launch(disagrees_on_mask, 1, 32, 0)},
    {"disagrees on operation", words(disagrees_on_operation, 32, 32)},
    {"reads outside mask", words(reads_outside_mask, 32, 32)},
    {"waits for each other", launch(waits_for_each_other, 1, 64, 0)},
    {"spins", words(spins, 2, 1)},
    {"writes past shared", launch(writes_past_shared, 1, 1, 0, 3)},
    {"writes before shared", launch(writes_past_shared, 1, 1, 0, -1)},
    {"writes past dynamic shared", launch(writes_past_dynamic_shared, 1, 1, 33, 33)},
    {"reads past shared", launch(reads_past_shared, 1, 1, 0, 5, &word)},
    {"reads unwritten shared", unwritten},
    {"static shared beyond 48 KB", launch(has_large_shared, 1, 1, 4000, &word)},
    {"dynamic shared beyond 48 KB", launch(does_nothing, 1, 1, 50000, 0)},
    {"empty grid", launch(does_nothing, 0, 32, 0, 0)},
    {"grid beyond 32 bits", launch(does_nothing, (1l << 32) + 1, 32, 0, 0)},
    {"tall grid",
     [] {
       TAPS_LAUNCH(does_nothing, dim3(1, 65536), 32, 0, nullptr, 0);
       return std::string();
     }},
    {"large block", launch(does_nothing, 1, 1025, 0, 0)},
};

}  // namespace

int main(int count, char** arguments) {
  const std::string order = arguments[1];
  for (const auto& [name, run] : kCases) {
    if (count > 3 && std::find(arguments + 3, arguments + count, name) == arguments + count) {
      continue;
    }
#if !defined(__CUDACC__)
    using enum simt::Order;
    simt::set_order(order == "forward"   ? kForward
                    : order == "reverse" ? kReverse
                                         : kShuffled,
                    std::stoull(arguments[2]));
#endif
    try {
      std::printf("%s\t%s\n", name.c_str(), run().c_str());
    } catch (const std::runtime_error& error) {
      std::printf("%s\terror: %s\n", name.c_str(), error.what());
    }
  }
}
