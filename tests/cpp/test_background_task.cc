// One thing at a time on another thread.
#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>

#include "base/background_task.h"
#include "check.h"

namespace moerun::test {
namespace {

void rest() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

}  // namespace

TEST("a background task runs beside its owner, who can wait for it, again and again") {
  BackgroundTask task;
  task.wait();  // nothing to do
  std::atomic<bool> may_end{false};
  std::thread::id where;
  int done = 0;  // what the task writes is seen after wait()
  task.start([&] {
    while (!may_end) std::this_thread::yield();
    where = std::this_thread::get_id();
    ++done;
  });
  may_end = true;
  task.wait();
  CHECK_EQ(done, 1);
  CHECK(where != std::this_thread::get_id() && where != std::thread::id());
  for (int i = 0; i < 200; ++i) {
    task.start([&done] { ++done; });
    task.wait();
    task.wait();
    CHECK_EQ(done, i + 2);
  }
}

TEST("a background task passes on what its work threw, once") {
  BackgroundTask task;
  int done = 0;
  for (int i = 0; i < 3; ++i) {
    task.start([] { throw std::runtime_error("no luck"); });
    CHECK_THROWS(std::runtime_error, task.wait(), "no luck");
    task.wait();
    task.start([&done] { ++done; });
    task.wait();
    CHECK_EQ(done, i + 1);
  }
}

TEST("a background task keeps its work until it is done, and no longer") {
  BackgroundTask task;
  auto owned = std::make_shared<int>(1);
  const std::weak_ptr<int> watched = owned;
  task.start([owned = std::move(owned)] {
    rest();
    ++*owned;
  });
  CHECK(!watched.expired());
  task.wait();
  CHECK(watched.expired());
}

TEST("a background task that is destroyed waits for its work, whatever that throws") {
  for (const bool fails : {false, true}) {
    int done = 0;
    {
      BackgroundTask task;
      task.start([&done, fails] {
        rest();
        ++done;
        if (fails) throw std::runtime_error("nobody waits for this");
      });
    }
    CHECK_EQ(done, 1);
  }
  const BackgroundTask idle;
}

}  // namespace moerun::test
