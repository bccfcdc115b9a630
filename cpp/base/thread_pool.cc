#include "base/thread_pool.h"

#include <string>
#include <system_error>

#include "base/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moerun {
namespace {

// Decoding starts a new loop every few tens of microseconds: waking a sleeping thread would cost
// as much as the work. So threads spin about that long before they sleep in the kernel.
constexpr int kSpinsBeforeSleep = 4000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 1) {
    throw InvalidArgument(message("threads: expected at least 1, found ", num_threads));
  }
  threads_.reserve(static_cast<std::size_t>(num_threads) - 1);
  try {
    for (int worker = 1; worker < num_threads; ++worker) {
      threads_.emplace_back([this, worker] { worker_main(worker); });
    }
  } catch (const std::system_error& error) {
    const auto started = threads_.size() + 1;
    stopping_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
    throw OutOfMemory(message("the system refused thread ", started + 1, " of ", num_threads, ": ",
                              error.what(), "; ask for fewer threads"));
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(std::size_t num_items, Function function, void* context) {
  if (num_items == 0) return;
  if (threads_.empty() || num_items == 1) {
    for (std::size_t item = 0; item < num_items; ++item) function(context, item, 0);
    return;
  }
  function_ = function;
  context_ = context;
  num_items_ = num_items;
  next_item_.store(0, std::memory_order_relaxed);
  num_working_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  work(0);
  for (int spins = 0; num_working_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpinsBeforeSleep) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::work(int worker) {
  for (;;) {
    const std::size_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
    if (item >= num_items_) return;
    try {
      function_(context_, item, worker);
    } catch (...) {
      next_item_.store(num_items_, std::memory_order_relaxed);
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }
}

void ThreadPool::worker_main(int worker) {
  std::uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins < kSpinsBeforeSleep) {
        pause();
      } else {
        generation_.wait(seen, std::memory_order_acquire);
      }
    }
    ++seen;
    if (stopping_.load(std::memory_order_acquire)) return;
    work(worker);
    num_working_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace moerun
