// Persistent threads that share loops. The caller's thread works too, so a pool of one starts none.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "base/loop_sharing.h"
#include "base/loop_work.h"
#include "base/per_process.h"
#include "base/thread_team.h"

namespace moerun {

// Usable in a forked process, which starts threads of its own at the first shared loop.
class ThreadPool {
 public:
  // `num_threads` counts the caller's thread; at least 1. OutOfMemory where the system refuses one.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Threads that a loop of so much work gets now: few for little work, and where other programs
  // use the cores. Results must not depend on it.
  int threads_for(const LoopWork& work) const { return sharing_.threads_for(work.nanoseconds()); }
  // Of the loops with an estimate of their work.
  ThreadUse use() const { return sharing_.use(); }

  // Calls body(item, worker) once for every item in [0, num_items), in any order, on any thread;
  // `worker` is in [0, num_threads()) and tells which scratch memory is the caller's own. Returns
  // when all are done. The first exception thrown by a body is rethrown here, the items that had
  // not started by then are skipped. ForkError in the child of a body that forks. Not reentrant:
  // one loop at a time.
  template <typename Body>
  void parallel_for(std::size_t num_items, const LoopWork& work, Body&& body) {
    const std::uint64_t estimate = work.nanoseconds();
    if (num_items <= 1 || !LoopSharing::is_worth_sharing(estimate)) {
      return run_alone(num_items, body);
    }
    const int threads = sharing_.threads_for(estimate);
    if (threads > 1) return measure(estimate, threads, num_items, loop_of(body));
    const auto begin = Clock::now();
    run_alone(num_items, body);
    const std::uint64_t elapsed = nanoseconds_since(begin);
    sharing_.record({estimate, elapsed, elapsed, num_items, num_items});
  }

  // The same for loops that take long, whatever their items do: all threads share them.
  template <typename Body>
  void parallel_for(std::size_t num_items, Body&& body) {
    if (num_threads_ == 1 || num_items <= 1) return run_alone(num_items, body);
    run(num_threads_, num_items, loop_of(body));
  }

 private:
  using Clock = std::chrono::steady_clock;

  template <typename Body>
  static LoopBody loop_of(Body& body) {
    return {[](void* pointer, std::size_t item, int worker) {
              (*static_cast<std::remove_reference_t<Body>*>(pointer))(item, worker);
            },
            const_cast<void*>(static_cast<const void*>(&body))};
  }
  template <typename Body>
  static void run_alone(std::size_t num_items, Body& body) {
    for (std::size_t item = 0; item < num_items; ++item) body(item, 0);
  }
  static std::uint64_t nanoseconds_since(Clock::time_point begin) {
    return static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count());
  }

  void measure(std::uint64_t estimate, int threads, std::size_t num_items, const LoopBody& body);
  CallerPart run(int threads, std::size_t num_items, const LoopBody& body);

  int num_threads_;
  LoopSharing sharing_;
  PerProcess<ThreadTeam> team_;
};

}  // namespace moerun
