// The threads of a pool, and how a loop gets to them and back.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace moerun {

struct LoopBody {
  void (*function)(void* data, std::size_t item, int worker) = nullptr;
  void* data = nullptr;
};

// Share of the caller in a loop.
struct CallerPart {
  std::size_t items = 0;
  std::uint64_t nanoseconds = 0;
};

// A loop is a room with a gate, a word with the number of places left and of workers inside. The
// caller describes the loop while the gate is closed and nobody is inside, then opens it; a worker
// enters by taking a place; the first thread that finds no item left closes it. The caller waits
// for the workers inside, and for no others: a worker that wakes late finds the gate closed, and
// does not touch the loop.
class ThreadTeam {
 public:
  // OutOfMemory where the system refuses a thread.
  explicit ThreadTeam(int num_workers);
  // Not during a loop.
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  // Shares the loop among the caller and up to `num_helpers` workers.
  CallerPart run(int num_helpers, std::size_t num_items, const LoopBody& body);

 private:
  void stop_all();
  void worker_main(int worker);
  bool wait_for_place(std::uint32_t& gate);
  void leave();
  std::size_t work(int worker);
  void wait_for_helpers();

  // Written by the caller while the gate is closed and nobody is inside.
  LoopBody body_;
  std::size_t num_items_ = 0;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;

  alignas(64) std::atomic<std::uint32_t> gate_{0};
  std::atomic<int> num_asleep_{0};          // workers in the kernel, or on the way
  std::atomic<std::uint32_t> is_empty_{0};  // wakes a caller that sleeps
  alignas(64) std::atomic<std::size_t> next_item_{0};
  std::vector<std::thread> threads_;
};

}  // namespace moerun
