// What device code calls: barriers, warp operations, atomics and intrinsics, overloaded as CUDA overloads them, so that
// what nvcc would refuse is refused here. The last argument of whatever waits is the place of the call.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "simt/machine.h"

// ---- The block ----

inline void __syncthreads(simt::detail::Place place = simt::detail::Place::current()) {
  simt::detail::wait_for_block("__syncthreads", false, place);
}
inline int __syncthreads_count(int predicate, simt::detail::Place place = simt::detail::Place::current()) {
  return simt::detail::wait_for_block("__syncthreads_count", predicate != 0, place);
}
inline int __syncthreads_or(int predicate, simt::detail::Place place = simt::detail::Place::current()) {
  return simt::detail::wait_for_block("__syncthreads_or", predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, simt::detail::Place place = simt::detail::Place::current()) {
  return simt::detail::wait_for_block("__syncthreads_and", predicate == 0, place) == 0;
}
inline void __threadfence() {
  simt::detail::preemption_point();
}
inline void __threadfence_block() {
  simt::detail::preemption_point();
}

// ---- The warp ----

namespace simt::detail {

template <typename T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename Visit>
void for_lanes(unsigned mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) {
    visit(std::countr_zero(mask));
  }
}

inline void combine_nothing(Lanes&, unsigned) {}

inline void combine_shuffle(Lanes& lanes, unsigned mask) {
  for_lanes(mask, [&](int lane) { lanes.result[lane] = lanes.value[lanes.source[lane]]; });
}

inline void combine_ballot(Lanes& lanes, unsigned mask) {
  uint64_t votes = 0;
  for_lanes(mask, [&](int lane) { votes |= lanes.value[lane] << lane; });
  for_lanes(mask, [&](int lane) { lanes.result[lane] = votes; });
}

inline void combine_match(Lanes& lanes, unsigned mask) {
  for_lanes(mask, [&](int lane) {
    lanes.result[lane] = 0;
    for_lanes(mask, [&](int other) {
      lanes.result[lane] |= static_cast<uint64_t>(lanes.value[other] == lanes.value[lane]) << other;
    });
  });
}

template <typename T, auto kReduce>
void combine_reduce(Lanes& lanes, unsigned mask) {
  T all = from_bits<T>(lanes.value[std::countr_zero(mask)]);
  for_lanes(mask & (mask - 1), [&](int lane) { all = kReduce(all, from_bits<T>(lanes.value[lane])); });
  for_lanes(mask, [&](int lane) { lanes.result[lane] = bits_of(all); });
}

enum class Shuffle { kIndex, kUp, kDown, kXor };

// The lane that a lane reads from: itself, where the one asked for is outside its segment of `width` lanes.
inline int shuffle_source(Shuffle kind, int lane, int argument, int width) {
  const int segment = lane & -width;
  argument &= 31;
  switch (kind) {
    case Shuffle::kIndex:
      return segment + argument % width;
    case Shuffle::kUp:
      return lane - argument < segment ? lane : lane - argument;
    case Shuffle::kDown:
      return lane + argument >= segment + width ? lane : lane + argument;
    default:
      return (lane ^ argument) >= segment + width ? lane : lane ^ argument;
  }
}

template <typename T>
T shuffle(const char* name, Shuffle kind, unsigned mask, T value, int argument, int width, const Place& place) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(std::string(name) + " has a width of " + std::to_string(width) + ", which must be a power of two up to 32");
  }
  const int source = shuffle_source(kind, lane_of_thread(), argument, width);
  return from_bits<T>(wait_for_lanes(name, combine_shuffle, mask, bits_of(value), source, place));
}

inline unsigned ballot(const char* name, unsigned mask, bool vote, const Place& place) {
  return static_cast<unsigned>(wait_for_lanes(name, combine_ballot, mask, vote, -1, place));
}

}  // namespace simt::detail

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, simt::detail::Place place = simt::detail::Place::current()) {
  simt::detail::wait_for_lanes("__syncwarp", simt::detail::combine_nothing, mask, 0, -1, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::detail::Place place = simt::detail::Place::current()) {
  return simt::detail::ballot("__ballot_sync", mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, simt::detail::Place place = simt::detail::Place::current()) {
  return simt::detail::ballot("__any_sync", mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::detail::Place place = simt::detail::Place::current()) {
  return simt::detail::ballot("__all_sync", mask, predicate == 0, place) == 0;
}

#define SIMT_WARP_VALUES(type)                                                                                        \
  inline type __shfl_sync(unsigned mask, type value, int lane, int width = 32,                                        \
                          simt::detail::Place place = simt::detail::Place::current()) {                               \
    using enum simt::detail::Shuffle;                                                                                 \
    return simt::detail::shuffle("__shfl_sync", kIndex, mask, value, lane, width, place);                             \
  }                                                                                                                   \
  inline type __shfl_up_sync(unsigned mask, type value, unsigned delta, int width = 32,                               \
                             simt::detail::Place place = simt::detail::Place::current()) {                            \
    using enum simt::detail::Shuffle;                                                                                 \
    return simt::detail::shuffle("__shfl_up_sync", kUp, mask, value, static_cast<int>(delta), width, place);          \
  }                                                                                                                   \
  inline type __shfl_down_sync(unsigned mask, type value, unsigned delta, int width = 32,                             \
                               simt::detail::Place place = simt::detail::Place::current()) {                          \
    using enum simt::detail::Shuffle;                                                                                 \
    return simt::detail::shuffle("__shfl_down_sync", kDown, mask, value, static_cast<int>(delta), width, place);      \
  }                                                                                                                   \
  inline type __shfl_xor_sync(unsigned mask, type value, int lanes, int width = 32,                                   \
                              simt::detail::Place place = simt::detail::Place::current()) {                           \
    using enum simt::detail::Shuffle;                                                                                 \
    return simt::detail::shuffle("__shfl_xor_sync", kXor, mask, value, lanes, width, place);                          \
  }                                                                                                                   \
  inline unsigned __match_any_sync(unsigned mask, type value,                                                         \
                                   simt::detail::Place place = simt::detail::Place::current()) {                      \
    using namespace simt::detail;                                                                                     \
    return static_cast<unsigned>(wait_for_lanes("__match_any_sync", combine_match, mask, bits_of(value), -1, place)); \
  }

SIMT_WARP_VALUES(int)
SIMT_WARP_VALUES(unsigned)
SIMT_WARP_VALUES(long)
SIMT_WARP_VALUES(unsigned long)
SIMT_WARP_VALUES(long long)
SIMT_WARP_VALUES(unsigned long long)
SIMT_WARP_VALUES(float)
SIMT_WARP_VALUES(double)
#undef SIMT_WARP_VALUES

#define SIMT_WARP_REDUCTION(type, name, expression)                                                                \
  inline type name(unsigned mask, type value, simt::detail::Place place = simt::detail::Place::current()) {        \
    using namespace simt::detail;                                                                                  \
    constexpr auto kReduce = [](type a, type b) -> type { return expression; };                                    \
    return from_bits<type>(wait_for_lanes(#name, combine_reduce<type, kReduce>, mask, bits_of(value), -1, place)); \
  }

SIMT_WARP_REDUCTION(unsigned, __reduce_add_sync, a + b)
SIMT_WARP_REDUCTION(unsigned, __reduce_min_sync, a < b ? a : b)
SIMT_WARP_REDUCTION(unsigned, __reduce_max_sync, a > b ? a : b)
SIMT_WARP_REDUCTION(unsigned, __reduce_and_sync, a& b)
SIMT_WARP_REDUCTION(unsigned, __reduce_or_sync, a | b)
SIMT_WARP_REDUCTION(unsigned, __reduce_xor_sync, a ^ b)
SIMT_WARP_REDUCTION(int, __reduce_add_sync, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
SIMT_WARP_REDUCTION(int, __reduce_min_sync, a < b ? a : b)
SIMT_WARP_REDUCTION(int, __reduce_max_sync, a > b ? a : b)
#undef SIMT_WARP_REDUCTION

// ---- Atomics: one host thread runs all threads, so that a plain update is atomic ----

#define SIMT_ATOMIC(type, name, expression)                    \
  SIMT_UNWATCHED inline type name(type* address, type value) { \
    simt::detail::before_atomic(address);                      \
    const type old = *address;                                 \
    *address = (expression);                                   \
    return old;                                                \
  }
#define SIMT_ATOMICS(type)                                \
  SIMT_ATOMIC(type, atomicMin, old < value ? old : value) \
  SIMT_ATOMIC(type, atomicMax, old > value ? old : value) \
  SIMT_ATOMIC(type, atomicAnd, old& value)                \
  SIMT_ATOMIC(type, atomicOr, old | value)                \
  SIMT_ATOMIC(type, atomicXor, old ^ value)
#define SIMT_ATOMIC_WORDS(type)                                                   \
  SIMT_ATOMIC(type, atomicExch, value)                                            \
  SIMT_UNWATCHED inline type atomicCAS(type* address, type compare, type value) { \
    simt::detail::before_atomic(address);                                         \
    const type old = *address;                                                    \
    *address = old == compare ? value : old;                                      \
    return old;                                                                   \
  }

SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(long long)
SIMT_ATOMICS(unsigned long long)
SIMT_ATOMIC_WORDS(int)
SIMT_ATOMIC_WORDS(unsigned)
SIMT_ATOMIC_WORDS(unsigned long long)
SIMT_ATOMIC(unsigned, atomicAdd, old + value)
SIMT_ATOMIC(unsigned long long, atomicAdd, old + value)
SIMT_ATOMIC(int, atomicAdd, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
SIMT_ATOMIC(unsigned, atomicSub, old - value)
SIMT_ATOMIC(int, atomicSub, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
#undef SIMT_ATOMIC_WORDS
#undef SIMT_ATOMICS
#undef SIMT_ATOMIC

// ---- Loads, stores, bits ----

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
SIMT_UNWATCHED T __ldcg(const T* address) {  // what a thread would spin on
  simt::detail::before_atomic(address, false);
  return *address;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
  return std::countl_zero(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(uint64_t{x} * y >> 32);
}
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}

// min and max are CUDA's for arithmetic types of the same kind; anything else is ambiguous here.
#define SIMT_MIN_MAX(type)          \
  inline type min(type a, type b) { \
    return b < a ? b : a;           \
  }                                 \
  inline type max(type a, type b) { \
    return a < b ? b : a;           \
  }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}
