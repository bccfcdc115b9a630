// Persistent threads that share loops. The caller's thread works too, so a pool of one starts none.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace moerun {

class ThreadPool {
 public:
  // `num_threads` counts the caller's thread; at least 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls body(item, worker) once for every item in [0, num_items), in any order, on any thread;
  // `worker` is in [0, num_threads()) and tells which scratch memory is the caller's own. Returns
  // when all are done. The first exception thrown by a body is rethrown here, the items that had
  // not started by then are skipped. Not reentrant: one loop at a time.
  template <typename Body>
  void parallel_for(std::size_t num_items, Body&& body) {
    using Decayed = std::remove_reference_t<Body>;
    run(
        num_items,
        [](void* context, std::size_t item, int worker) {
          (*static_cast<Decayed*>(context))(item, worker);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Function = void (*)(void* context, std::size_t item, int worker);

  void run(std::size_t num_items, Function function, void* context);
  void work(int worker);
  void worker_main(int worker);

  Function function_ = nullptr;
  void* context_ = nullptr;
  std::size_t num_items_ = 0;
  std::atomic<std::size_t> next_item_{0};
  std::atomic<int> num_working_{0};
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
  std::vector<std::thread> threads_;
};

}  // namespace moerun
