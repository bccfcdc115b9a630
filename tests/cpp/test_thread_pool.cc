#include <atomic>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"
#include "check.h"

namespace moerun::test {

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

TEST("a pool without threads is refused") {
  CHECK_THROWS(InvalidArgument, ThreadPool(0), "threads", "0");
}

}  // namespace moerun::test
