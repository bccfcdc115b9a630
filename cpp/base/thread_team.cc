#include "base/thread_team.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/fork.h"
#include "base/futex.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moerun {
namespace {

using Clock = std::chrono::steady_clock;

// Bits of the gate. The model allows 1,024 threads.
constexpr std::uint32_t kInside = 0x0000'0fff;        // workers
constexpr std::uint32_t kCallerSleeps = 0x0000'1000;  // the last to leave wakes it
constexpr std::uint32_t kStop = 0x0000'2000;
constexpr std::uint32_t kPlace = 0x0001'0000;
constexpr std::uint32_t kPlaces = 0xffff'0000;
constexpr int kMaxWorkers = 4095;

// Between two loops of a pass the caller works alone for some 10 microseconds, for which a sleeping
// worker is not worth waking.
constexpr auto kWorkerSpins = std::chrono::microseconds(100);

// At the end of a loop the caller waits for items that take about as long as its own did. A worker
// that takes longer has probably lost its core, and gets that of the caller if this one sleeps.
constexpr Clock::duration kLeastCallerSpins = std::chrono::microseconds(20);
constexpr Clock::duration kMostCallerSpins = std::chrono::microseconds(500);

Clock::duration caller_spins(Clock::duration own, std::size_t own_items) {
  const auto items = static_cast<Clock::rep>(std::max<std::size_t>(1, own_items));
  return std::clamp(own / items * 3 / 2, kLeastCallerSpins, kMostCallerSpins);
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Calls is_over() for a while; whether it was true.
template <typename IsOver>
bool spin(Clock::duration most, const IsOver& is_over) {
  constexpr int kPausesPerLook = 32;  // at the clock
  const auto end = Clock::now() + most;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (is_over()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

ThreadTeam::ThreadTeam(int num_workers) {
  if (num_workers > kMaxWorkers) {
    throw InvalidArgument(
        message("threads: expected at most ", kMaxWorkers + 1, ", found ", num_workers + 1));
  }
  threads_.reserve(static_cast<std::size_t>(num_workers));
  try {
    for (int worker = 1; worker <= num_workers; ++worker) {
      threads_.emplace_back([this, worker] { worker_main(worker); });
    }
  } catch (const std::system_error& error) {
    const auto started = threads_.size() + 1;
    stop_all();
    throw OutOfMemory(message("the system refused thread ", started + 1, " of ", num_workers + 1,
                              ": ", error.what(), "; ask for fewer threads"));
  }
}

ThreadTeam::~ThreadTeam() { stop_all(); }

void ThreadTeam::stop_all() {
  gate_.fetch_or(kStop);
  futex_wake(gate_, INT_MAX);
  for (auto& thread : threads_) thread.join();
}

CallerPart ThreadTeam::run(int num_helpers, std::size_t num_items, const LoopBody& body) {
  const std::uint32_t generation = fork_generation();
  body_ = body;
  num_items_ = num_items;
  next_item_.store(0, std::memory_order_relaxed);
  // A worker counts itself asleep and then looks at the gate; here it is the other way round.
  gate_.store(static_cast<std::uint32_t>(num_helpers) * kPlace);
  if (num_asleep_.load() != 0) futex_wake(gate_, num_helpers);
  const auto begin = Clock::now();
  const std::size_t own_items = work(0);
  const auto own = Clock::now() - begin;
  if (generation != fork_generation()) {
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    throw ForkError(
        "the process was forked in the middle of a loop, whose other threads exist "
        "only in the parent");
  }
  gate_.fetch_and(~kPlaces, std::memory_order_acq_rel);
  const auto is_empty = [this] { return (gate_.load(std::memory_order_acquire) & kInside) == 0; };
  if (!spin(caller_spins(own, own_items), is_empty)) wait_for_helpers();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  return {own_items, static_cast<std::uint64_t>(
                         std::chrono::duration_cast<std::chrono::nanoseconds>(own).count())};
}

// Asleep, with the gate closed.
void ThreadTeam::wait_for_helpers() {
  is_empty_.store(0, std::memory_order_relaxed);
  std::uint32_t gate = gate_.load(std::memory_order_acquire);
  do {
    if ((gate & kInside) == 0) return;
  } while (!gate_.compare_exchange_weak(gate, gate | kCallerSleeps, std::memory_order_acq_rel,
                                        std::memory_order_acquire));
  // From here on the last worker to leave writes is_empty_: returning earlier would race with it.
  while (is_empty_.load(std::memory_order_acquire) == 0) futex_wait(is_empty_, 0);
}

std::size_t ThreadTeam::work(int worker) {
  for (std::size_t done = 0;; ++done) {
    const std::size_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
    if (item >= num_items_) return done;
    try {
      body_.function(body_.data, item, worker);
    } catch (...) {
      next_item_.store(num_items_, std::memory_order_relaxed);
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }
}

void ThreadTeam::worker_main(int worker) {
  std::uint32_t gate = gate_.load(std::memory_order_acquire);
  while (wait_for_place(gate)) {
    if (!gate_.compare_exchange_weak(gate, gate - kPlace + 1, std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
      continue;
    }
    work(worker);
    leave();
    gate = gate_.load(std::memory_order_acquire);
  }
}

// Until the gate is open; false: the team stops. `gate` is what was seen of it last.
bool ThreadTeam::wait_for_place(std::uint32_t& gate) {
  const auto has_changed = [&] {
    gate = gate_.load(std::memory_order_acquire);
    return (gate & (kPlaces | kStop)) != 0;
  };
  while (!spin(kWorkerSpins, has_changed)) {
    num_asleep_.fetch_add(1);
    gate = gate_.load();
    if ((gate & (kPlaces | kStop)) == 0) futex_wait(gate_, gate);
    num_asleep_.fetch_sub(1);
  }
  return (gate & kStop) == 0;
}

void ThreadTeam::leave() {
  std::uint32_t gate = gate_.load(std::memory_order_relaxed);
  std::uint32_t next = 0;
  do {
    next = (gate & ~kPlaces) - 1;  // no item is left, so nobody needs to enter
    if ((next & kInside) == 0) next &= ~kCallerSleeps;
  } while (!gate_.compare_exchange_weak(gate, next, std::memory_order_acq_rel,
                                        std::memory_order_relaxed));
  if ((gate & kCallerSleeps) != 0 && (next & kInside) == 0) {
    is_empty_.store(1, std::memory_order_release);
    futex_wake(is_empty_, 1);
  }
}

}  // namespace moerun
