// How many threads a loop gets. Loops that are too small run on one. For others the times of past
// loops decide: where another program uses a core, the thread on it holds up the others.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/thread_use.h"

namespace moerun {

// Times of one loop, in nanoseconds.
struct LoopTimes {
  std::uint64_t work = 0;  // the estimate
  std::uint64_t wall = 0;
  std::uint64_t own = 0;  // in which the caller computed its items
  std::size_t own_items = 0;
  std::size_t items = 0;
};

// Loops of similar size share a decision. A thread is withdrawn where the loops take as long as
// with fewer threads, which a trial of some loops has to confirm; later trials give it back. The
// pauses between trials grow while their outcome stays the same. Pure arithmetic, no clock.
// One thread calls it; use() may come from any.
class LoopSharing {
 public:
  explicit LoopSharing(int num_threads);

  // At least 1. Does not change between two calls of record().
  int threads_for(std::uint64_t work_ns) const;
  // Of every loop with enough work for two threads.
  void record(const LoopTimes& times);
  static bool is_worth_sharing(std::uint64_t work_ns);
  ThreadUse use() const;

 private:
  // Loops whose estimates differ by less than a factor of 4.
  struct Size {
    int threads = 0;  // at most, outside of trials
    int trial = 0;    // at most, during a trial; 0: none
    double rate = 0;  // estimated work by time, outside of trials
    std::uint64_t pause = 0;
    std::uint64_t until_trial = 0;
    // Sums of the window:
    std::uint64_t work = 0;
    std::uint64_t wall = 0;
    double alone = 0;  // time that the caller would have taken for all items
    std::size_t loops = 0;
  };

  void end_window(Size& size);
  void end_trial(Size& size, double rate);
  int most_threads_for(std::uint64_t work_ns, int most) const;
  static std::size_t index_of(std::uint64_t work_ns);

  int num_threads_;
  std::array<Size, 16> sizes_;
  // Nanoseconds, as of ThreadUse.
  std::atomic<std::uint64_t> wall_{0};
  std::atomic<std::uint64_t> given_{0};
  std::atomic<std::uint64_t> wanted_{0};
};

}  // namespace moerun
