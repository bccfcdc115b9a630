#include "base/thread_pool.h"

#include "base/error.h"
#include "base/thread_team.h"

namespace moerun {
namespace {

int checked(int num_threads) {
  if (num_threads >= 1) return num_threads;
  throw InvalidArgument(message("threads: expected at least 1, found ", num_threads));
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(checked(num_threads)),
      sharing_(num_threads),
      team_(std::make_unique<ThreadTeam>(num_threads - 1)) {}

ThreadPool::~ThreadPool() = default;

void ThreadPool::measure(std::uint64_t estimate, int threads, std::size_t num_items,
                         const LoopBody& body) {
  const auto begin = Clock::now();
  const CallerPart own = run(threads, num_items, body);
  sharing_.record({estimate, nanoseconds_since(begin), own.nanoseconds, own.items, num_items});
}

CallerPart ThreadPool::run(int threads, std::size_t num_items, const LoopBody& body) {
  ThreadTeam& team =
      team_.get([&](const ThreadTeam&) { return std::make_unique<ThreadTeam>(num_threads_ - 1); });
  return team.run(threads - 1, num_items, body);
}

}  // namespace moerun
