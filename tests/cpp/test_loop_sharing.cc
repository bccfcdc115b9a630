// Choosing the number of threads from the times of loops, here of a made-up machine.
#include <cstdint>
#include <functional>
#include <set>

#include "base/loop_sharing.h"
#include "check.h"

namespace moerun::test {
namespace {

constexpr std::uint64_t kMillion = 1'000'000;
constexpr std::uint64_t kWork = 400'000;  // estimated nanoseconds of a loop

// The time that a loop takes with so many threads.
using Machine = std::function<std::uint64_t(int threads)>;

std::uint64_t quiet(int threads) { return kWork / static_cast<unsigned>(threads) + 5'000; }

// A core is taken, and the thread on it waits for it half of the time: a whole loop waits with it.
std::uint64_t one_core_of_two_is_taken(int threads) { return threads == 1 ? kWork : 3 * kWork; }

void run(LoopSharing& sharing, const Machine& machine, std::uint64_t nanoseconds) {
  constexpr std::size_t kItems = 64;
  for (std::uint64_t done = 0; done < nanoseconds;) {
    const int threads = sharing.threads_for(kWork);
    const std::uint64_t wall = machine(threads);
    const std::size_t own_items = kItems / static_cast<unsigned>(threads);
    sharing.record({kWork, wall, kWork * own_items / kItems, own_items, kItems});
    done += wall;
  }
}

}  // namespace

TEST("a loop that is too small to be shared runs on one thread, however many there are") {
  const LoopSharing sharing(64);
  CHECK_EQ(sharing.threads_for(0), 1);
  CHECK_EQ(sharing.threads_for(5'000), 1);
  CHECK(!LoopSharing::is_worth_sharing(5'000));
  CHECK_EQ(sharing.threads_for(10'000), 3);
  CHECK_EQ(sharing.threads_for(1'000 * kMillion), 64);
  CHECK_EQ(LoopSharing(1).threads_for(1'000 * kMillion), 1);
}

TEST("on a quiet machine loops keep all their threads") {
  for (const int threads : {2, 3, 8}) {
    LoopSharing sharing(threads);
    run(sharing, quiet, 5'000 * kMillion);
    CHECK_EQ(sharing.threads_for(kWork), threads);
    CHECK(sharing.use().mean_threads() > 0.99 * threads);
    CHECK(sharing.use().mean_withheld() < 0.01);
  }
}

TEST("a thread whose core is taken is withdrawn soon, and comes back when the core is free") {
  LoopSharing sharing(2);
  run(sharing, quiet, 1'000 * kMillion);
  run(sharing, one_core_of_two_is_taken, 300 * kMillion);
  CHECK_EQ(sharing.threads_for(kWork), 1);
  run(sharing, quiet, 2'200 * kMillion);
  CHECK_EQ(sharing.threads_for(kWork), 2);
}

TEST("while a core is taken, trials cost less than a fiftieth of the time") {
  LoopSharing sharing(2);
  run(sharing, one_core_of_two_is_taken, 5'000 * kMillion);
  const ThreadUse before = sharing.use();
  run(sharing, one_core_of_two_is_taken, 20'000 * kMillion);
  const ThreadUse after = sharing.use();
  const double seconds = after.seconds - before.seconds;
  const double shared = after.thread_seconds - before.thread_seconds - seconds;
  CHECK(shared > 0);  // there are trials
  CHECK(after.mean_withheld() > 0.9);
  CHECK(shared < 0.02 * seconds);
}

TEST("where fewer threads are no faster, a trial of them is not repeated often") {
  // Memory is the limit: two threads wait for it as one does, but are faster.
  const Machine limited = [](int threads) { return threads == 1 ? kWork : kWork * 8 / 10; };
  LoopSharing sharing(2);
  run(sharing, limited, 5'000 * kMillion);
  const ThreadUse before = sharing.use();
  run(sharing, limited, 20'000 * kMillion);
  const ThreadUse after = sharing.use();
  const double seconds = after.seconds - before.seconds;
  CHECK(after.thread_seconds - before.thread_seconds > 1.98 * seconds);
}

TEST("of many threads a few are withdrawn where that is enough") {
  // Up to 12 threads have a core each; with more, every loop waits for a time slice.
  const Machine machine = [](int threads) {
    return quiet(threads) + (threads > 12 ? 300'000u : 0u);
  };
  LoopSharing sharing(16);
  run(sharing, machine, 3'000 * kMillion);
  CHECK_EQ(sharing.threads_for(kWork), 12);
}

TEST("loops of another size are decided on by themselves") {
  LoopSharing sharing(2);
  run(sharing, one_core_of_two_is_taken, 300 * kMillion);
  CHECK_EQ(sharing.threads_for(kWork), 1);
  CHECK_EQ(sharing.threads_for(100 * kWork), 2);
}

}  // namespace moerun::test
