#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"
#include "check.h"

namespace moerun::test {
namespace {

constexpr LoopWork kLarge{.bytes = std::size_t{1} << 30};
constexpr LoopWork kSmall{.bytes = 64};

void rest(std::chrono::microseconds time) { std::this_thread::sleep_for(time); }

}  // namespace

TEST("every item runs exactly once, on a worker of the pool") {
  for (int threads = 1; threads <= 5; ++threads) {
    ThreadPool pool(threads);
    for (const std::size_t items : {0u, 1u, 2u, 7u, 1000u}) {
      std::vector<std::atomic<int>> runs(items);
      pool.parallel_for(items, [&](std::size_t item, int worker) {
        CHECK(worker >= 0 && worker < threads);
        runs[item].fetch_add(1);
      });
      for (const auto& count : runs) CHECK_EQ(count.load(), 1);
    }
  }
}

TEST("many short loops follow each other without losing an item") {
  ThreadPool pool(3);
  std::atomic<std::size_t> sum{0};
  for (int loop = 0; loop < 5000; ++loop) {
    pool.parallel_for(4, [&](std::size_t item, int) { sum.fetch_add(item + 1); });
  }
  CHECK_EQ(sum.load(), std::size_t{50000});
}

TEST("the first exception of a body reaches the caller and the pool lives on") {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    CHECK_THROWS(FormatError,
                 pool.parallel_for(100,
                                   [](std::size_t item, int) {
                                     if (item % 10 == 3)
                                       throw FormatError("item " + std::to_string(item));
                                   }),
                 "item");
    std::atomic<int> runs{0};
    pool.parallel_for(10, [&](std::size_t, int) { runs.fetch_add(1); });
    CHECK_EQ(runs.load(), 10);
  }
}

TEST("a small loop runs on its caller alone, in order") {
  ThreadPool pool(3);
  std::vector<std::size_t> items;
  pool.parallel_for(100, kSmall, [&](std::size_t item, int worker) {
    CHECK_EQ(worker, 0);
    items.push_back(item);
  });
  CHECK_EQ(items.size(), std::size_t{100});
  for (std::size_t i = 0; i < items.size(); ++i) CHECK_EQ(items[i], i);
  CHECK_EQ(pool.threads_for(kSmall), 1);
  CHECK_EQ(pool.threads_for(kLarge), 3);
}

TEST("every item runs exactly once, whatever sizes of loops follow each other") {
  for (const int threads : {2, 3, 7}) {
    ThreadPool pool(threads);
    std::vector<std::atomic<int>> runs(40);
    for (int loop = 0; loop < 3000; ++loop) {
      // Estimates that let 1, 2 or all threads in; pauses in which workers fall asleep.
      const LoopWork work{.bytes = std::size_t{1} << (10 + loop % 20)};
      const std::size_t items = 1 + static_cast<std::size_t>(loop * 7 % 40);
      pool.parallel_for(items, work, [&](std::size_t item, int worker) {
        CHECK(worker >= 0 && worker < threads);
        runs[item].fetch_add(1, std::memory_order_relaxed);
      });
      for (std::size_t item = 0; item < runs.size(); ++item) {
        CHECK_EQ(runs[item].exchange(0, std::memory_order_relaxed), item < items ? 1 : 0);
      }
      if (loop % 100 == 0) rest(std::chrono::microseconds(200));
    }
  }
}

TEST("what a loop wrote is seen by its caller and by the next loop, without atomics") {
  ThreadPool pool(3);
  std::vector<std::size_t> values(64, 0);
  for (int loop = 0; loop < 2000; ++loop) {
    pool.parallel_for(values.size(), [&](std::size_t item, int) { ++values[item]; });
    std::size_t sum = 0;
    for (const std::size_t value : values) sum += value;
    CHECK_EQ(sum, values.size() * static_cast<std::size_t>(loop + 1));
  }
}

TEST("workers that fell asleep are woken for the next loop") {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    rest(std::chrono::milliseconds(2));
    std::atomic<int> at_work{0};
    std::atomic<bool> both{false};
    // Each item waits for the other: only two threads can end this.
    pool.parallel_for(2, [&](std::size_t, int) {
      at_work.fetch_add(1);
      while (!both) {
        if (at_work == 2) both = true;
        std::this_thread::yield();
      }
    });
    CHECK(both.load());
  }
}

TEST("a caller sleeps until a slow worker has finished its item") {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::atomic<int> done{0};
    std::atomic<bool> is_slow_started{false};
    pool.parallel_for(2, [&](std::size_t, int worker) {
      if (worker == 0) {
        while (!is_slow_started) std::this_thread::yield();
      } else {
        is_slow_started = true;
        rest(std::chrono::milliseconds(5));
      }
      done.fetch_add(1);
    });
    CHECK_EQ(done.load(), 2);
  }
}

TEST("a loop does not wait for workers that took no item") {
  // 3 threads on whatever cores there are, loops of nothing: a worker that is late finds the loop
  // gone, with the memory of its body.
  ThreadPool pool(3);
  for (int loop = 0; loop < 5000; ++loop) {
    auto values = std::make_unique<std::array<std::atomic<int>, 3>>();
    pool.parallel_for(3, [&](std::size_t item, int) { (*values)[item].store(1); });
    for (const auto& value : *values) CHECK_EQ(value.load(), 1);
  }
}

TEST("exceptions of several threads at once leave one for the caller, also of loops with work") {
  ThreadPool pool(4);
  for (int round = 0; round < 200; ++round) {
    CHECK_THROWS(FormatError,
                 pool.parallel_for(16, kLarge,
                                   [](std::size_t, int) { throw FormatError("every item fails"); }),
                 "every item fails");
  }
  std::atomic<int> runs{0};
  pool.parallel_for(16, kLarge, [&](std::size_t, int) { runs.fetch_add(1); });
  CHECK_EQ(runs.load(), 16);
}

TEST("a pool can be destroyed while its workers sleep, spin, or have not begun") {
  for (int round = 0; round < 100; ++round) {
    ThreadPool pool(3);
    if (round % 3 == 1) pool.parallel_for(8, [](std::size_t, int) {});
    if (round % 3 == 2) rest(std::chrono::microseconds(300));
  }
}

TEST("a pool tells how many threads its large loops had") {
  ThreadPool pool(2);
  CHECK_EQ(pool.use().mean_threads(), 0.0);
  pool.parallel_for(10, kSmall, [](std::size_t, int) {});
  CHECK_EQ(pool.use().mean_threads(), 0.0);
  pool.parallel_for(10, kLarge, [](std::size_t, int) { rest(std::chrono::microseconds(100)); });
  CHECK_EQ(pool.use().mean_threads(), 2.0);
  CHECK(pool.use().seconds > 0);
}

TEST("a pool without threads is refused") {
  CHECK_THROWS(InvalidArgument, ThreadPool(0), "threads", "0");
}

}  // namespace moerun::test
