// How the threads of a block take turns, and what they wait for: barriers and the lanes of warp operations.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "simt/races.h"
#include "simt/state.h"

namespace simt::detail {

namespace {

// ---- Taking turns ----

// Gives every thread its rank in the order in force.
void deal_ranks() {
  const int count = machine.num_threads;
  std::array<int, kMaxThreads> order;
  std::iota(order.begin(), order.begin() + count, 0);
  if (machine.order == Order::kReverse) {
    std::reverse(order.begin(), order.begin() + count);
  } else if (machine.order == Order::kShuffled) {
    // Half of the time warp by warp, so that some warps run far ahead of others.
    const int stride = random_below(2) == 0 ? 1 : kLanes;
    const int groups = (count + stride - 1) / stride;
    std::array<int, kMaxThreads> firsts;
    for (int group = 0; group < groups; ++group) {
      const int place = random_below(group + 1);
      firsts[group] = firsts[place];
      firsts[place] = group * stride;
    }
    int rank = 0;
    for (int group = 0; group < groups; ++group) {
      for (int thread = firsts[group]; thread < std::min(firsts[group] + stride, count); ++thread) {
        order[rank++] = thread;
      }
    }
  }
  machine.ready = {};
  for (int rank = 0; rank < count; ++rank) {
    Thread& thread = *machine.threads[order[rank]];
    thread.rank = rank;
    machine.by_rank[rank] = &thread;
    if (thread.state == State::kReady) {
      machine.ready.insert(rank);
    }
  }
}

void rewind_preemption() {
  steps_to_preemption = machine.order == Order::kShuffled ? 1 + random_below(kShuffledStretch) : kStretch;
}

void make_current(Thread& thread) {
  machine.current = &thread;
  thread_index = thread.index;
  run_thread(thread.number);
  rewind_preemption();
}

void hand_over(Thread& next, bool for_good = false) {
  Thread& self = *machine.current;
  if (&next == &self) {
    return;
  }
  ++machine.counters.switches;
  make_current(next);
  self.fiber.switch_to(next.fiber, for_good);
}

// Lets the ready thread of the lowest rank go on; returns when the calling one may.
void take_turns() {
  if (machine.ready.empty()) {
    fail("no thread can go on: " + who_waits());
  }
  hand_over(*machine.by_rank[machine.ready.first()]);
}

void wait(State state, const char* operation, const Place& place) {
  Thread& self = *machine.current;
  self.state = state;
  self.operation = operation;
  self.place = place;
  machine.ready.erase(self.rank);
  machine.steps = 0;
}

void wake(Thread& thread) {
  thread.state = State::kReady;
  machine.ready.insert(thread.rank);
}

// ---- The life of a thread ----

// What a thread that leaves makes impossible for the others.
void leave() {
  Thread& self = *machine.current;
  wait(State::kLeft, "its end", {});
  ++machine.num_left;
  if (machine.first_left == nullptr) {
    machine.first_left = &self;
  }
  if (machine.num_waiting > 0) {
    fail(waiting_text(*machine.first_waiting) + ", but " + text_of(self) + " has left the kernel");
  }
  const int index = self.number;
  Warp& warp = machine.warps[index / kLanes];
  const unsigned lane = 1u << index % kLanes;
  warp.present &= ~lane;
  for (int group = 0; group < warp.num_groups; ++group) {
    if (warp.groups[group].mask & lane) {
      fail(waiting_text(*machine.threads[index / kLanes * kLanes + warp.groups[group].first]) + " for lanes " +
           hex(warp.groups[group].mask) + ", but " + text_of(self) + " has left the kernel");
    }
  }
}

void live() {
  try {
    (*machine.body)();
    leave();
    if (machine.num_left < machine.num_threads && machine.ready.empty()) {
      take_turns();  // fails
    }
  } catch (...) {
    machine.error = std::current_exception();
  }
}

void enter() {
  machine.current->fiber.arrive();
  live();
  Thread& self = *machine.current;
  if (machine.error != nullptr || machine.num_left == machine.num_threads) {
    self.fiber.switch_to(machine.host, true);
  } else {
    hand_over(*machine.by_rank[machine.ready.first()], true);
  }
}

}  // namespace

// ---- Barriers ----

int wait_for_block(const char* operation, bool predicate, const Place& place) {
  Thread& self = *machine.current;
  if (machine.num_left > 0) {
    fail(text_of(self) + " waits at " + text_of(operation, place) + ", but " + text_of(*machine.first_left) +
         " has left the kernel");
  }
  if (machine.num_waiting == 0) {
    machine.first_waiting = &self;
  } else if (!same_place(machine.first_waiting->place, place)) {
    fail(text_of(self) + " waits at " + text_of(operation, place) + ", but " + waiting_text(*machine.first_waiting));
  }
  wait(State::kAtBarrier, operation, place);
  machine.num_true += predicate;
  if (++machine.num_waiting == machine.num_threads) {
    order_block();
    machine.barrier_result = std::exchange(machine.num_true, 0);
    machine.num_waiting = 0;
    for (int i = 0; i < machine.num_threads; ++i) {
      machine.threads[i]->state = State::kReady;
    }
    deal_ranks();
  }
  take_turns();
  return machine.barrier_result;
}

// ---- Warp operations ----

int lane_of_thread() {
  return machine.current == nullptr ? 0 : machine.current->number % kLanes;
}

namespace {

// A lane that arrives at a warp operation.
struct Arrival {
  const Thread& thread;
  Warp& warp;
  const char* operation;
  const Place& place;
  unsigned mask;
  int lane;

  std::string text() const { return text_of(thread) + " waits at " + text_of(operation, place); }
};

// The group of the mask and place, made if the caller is the first of it. Groups may overlap: a lane may wait for one
// that is still in another operation, but not the other way round too.
Group& join_group(const Arrival& arrival, Combine combine) {
  Warp& warp = arrival.warp;
  const int first_thread = arrival.thread.number - arrival.lane;
  for (int i = 0; i < warp.num_groups; ++i) {
    Group& group = warp.groups[i];
    const Thread& first = *machine.threads[first_thread + group.first];
    if (group.mask == arrival.mask && same_place(first.place, arrival.place)) {
      return group;
    }
    if ((group.mask >> arrival.lane & 1) && (group.arrived & arrival.mask)) {
      fail(arrival.text() + " for lanes " + hex(arrival.mask) + ", but " + waiting_text(first) + " for lanes " +
           hex(group.mask));
    }
  }
  return warp.groups[warp.num_groups++] = {arrival.mask, 0, arrival.lane, combine};
}

void check_mask(const Arrival& arrival, int source) {
  const unsigned mask = arrival.mask;
  const unsigned missing = mask & ~arrival.warp.present;
  if ((mask >> arrival.lane & 1) == 0) {
    fail(arrival.text() + " for lanes " + hex(mask) + ", which lack its own, " + std::to_string(arrival.lane));
  }
  if (missing != 0) {
    fail(arrival.text() + " for lanes " + hex(mask) + ", of which " + hex(missing) +
         " have left the kernel or do not exist");
  }
  if (source >= 0 && (mask >> source & 1) == 0) {
    fail(arrival.text() + " and reads from lane " + std::to_string(source) + ", which is not in its mask of lanes " +
         hex(mask));
  }
}

}  // namespace

uint64_t wait_for_lanes(const char* operation, Combine combine, unsigned mask, uint64_t value, int source,
                        const Place& place) {
  preemption_point();
  Thread& self = *machine.current;
  const int index = self.number;
  const int lane = index % kLanes;
  Warp& warp = machine.warps[index / kLanes];
  const Arrival arrival{self, warp, operation, place, mask, lane};
  check_mask(arrival, source);
  Group& group = join_group(arrival, combine);
  wait(State::kInWarp, operation, place);
  warp.lanes.value[lane] = value;
  warp.lanes.source[lane] = source;
  group.arrived |= 1u << lane;
  if (group.arrived == group.mask) {
    group.combine(warp.lanes, group.mask);
    if (combine == combine_nothing) {
      order_warp(index / kLanes);
    }
    for_lanes(group.mask, [&](int other) { wake(*machine.threads[index - lane + other]); });
    group = warp.groups[--warp.num_groups];
  }
  take_turns();
  return warp.lanes.result[lane];
}

// ---- Atomics ----

#if defined(__SANITIZE_THREAD__)
void record_atomic(const volatile void* address, size_t bytes, bool writes) {
  record_access(address, bytes, writes, true);
}
#endif

void preempt() {
  rewind_preemption();
  if (machine.current == nullptr) {
    return;
  }
  machine.steps += steps_to_preemption;
  if (machine.steps > kMostSteps) {
    fail(text_of(*machine.current) + " spins and no thread makes progress: does it wait for another block?");
  }
  const int rank = machine.order == Order::kShuffled ? random_below(machine.num_threads) : machine.current->rank;
  hand_over(*machine.by_rank[machine.ready.first_after(rank)]);
}

}  // namespace simt::detail
