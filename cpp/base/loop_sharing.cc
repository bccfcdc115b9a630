#include "base/loop_sharing.h"

#include <algorithm>
#include <bit>

namespace moerun {
namespace {

constexpr std::uint64_t kMillisecond = 1'000'000;

// Least estimated work of a thread, in nanoseconds. On two quiet cores (virtual Xeon, AVX-512)
// loops of 3 µs a thread gain (a small model decodes 3,400 tokens/s, not 2,400), shorter ones do
// not; where cores are taken, trials withdraw the threads.
constexpr std::uint64_t kGrain = 3'000;

// Loops are judged together for at least this long: several time slices of the system, which on
// Linux are some 3 ms.
constexpr std::uint64_t kWindow = 20 * kMillisecond;
constexpr std::size_t kWindowLoops = 4;

// Of the time between trials. At most one window in a hundred is spent on a worse choice.
constexpr std::uint64_t kFirstPause = 100 * kMillisecond;
constexpr std::uint64_t kLastPause = 2'000 * kMillisecond;

constexpr double kPoor = 0.75;    // share of the threads' time that is of use, or a trial is due
constexpr double kAsGood = 0.98;  // of the rate: enough for fewer threads
constexpr double kBetter = 1.08;  // of the rate: needed for more threads
constexpr double kNewRateShare = 0.5;  // of a window in the moving average

int fewer(int threads) { return threads - std::max(1, threads / 4); }
int more(int threads, int most) { return std::min(most, threads + std::max(1, threads / 3)); }

}  // namespace

LoopSharing::LoopSharing(int num_threads) : num_threads_(num_threads) {
  for (Size& size : sizes_) {
    size.threads = num_threads;
    size.pause = kFirstPause;
  }
}

bool LoopSharing::is_worth_sharing(std::uint64_t work_ns) { return work_ns >= 2 * kGrain; }

std::size_t LoopSharing::index_of(std::uint64_t work_ns) {
  const auto width =
      static_cast<int>(std::bit_width(work_ns / kGrain));  // at least 2 where sharing is worth it
  return static_cast<std::size_t>(std::clamp(width / 2, 0, 15));
}

int LoopSharing::most_threads_for(std::uint64_t work_ns, int most) const {
  if (num_threads_ == 1 || !is_worth_sharing(work_ns)) return 1;
  return static_cast<int>(std::min<std::uint64_t>(work_ns / kGrain, static_cast<unsigned>(most)));
}

int LoopSharing::threads_for(std::uint64_t work_ns) const {
  const Size& size = sizes_[index_of(work_ns)];
  return most_threads_for(work_ns, size.trial != 0 ? size.trial : size.threads);
}

void LoopSharing::record(const LoopTimes& times) {
  const auto given = static_cast<std::uint64_t>(threads_for(times.work));
  const auto wanted = static_cast<std::uint64_t>(most_threads_for(times.work, num_threads_));
  wall_.fetch_add(times.wall, std::memory_order_relaxed);
  given_.fetch_add(times.wall * given, std::memory_order_relaxed);
  wanted_.fetch_add(times.wall * wanted, std::memory_order_relaxed);
  if (num_threads_ == 1) return;
  Size& size = sizes_[index_of(times.work)];
  size.work += times.work;
  size.wall += times.wall;
  size.alone += static_cast<double>(times.own) * static_cast<double>(times.items) /
                static_cast<double>(std::max<std::size_t>(1, times.own_items));
  ++size.loops;
  if (size.wall >= kWindow && size.loops >= kWindowLoops) end_window(size);
}

void LoopSharing::end_window(Size& size) {
  const auto wall = static_cast<double>(size.wall);
  const double rate = static_cast<double>(size.work) / wall;
  const double useful = size.alone / wall;  // threads
  size.until_trial -= std::min(size.until_trial, size.wall);
  size.work = size.wall = 0;
  size.alone = 0;
  size.loops = 0;
  if (size.trial != 0) return end_trial(size, rate);
  size.rate = size.rate == 0 ? rate : size.rate + kNewRateShare * (rate - size.rate);
  if (size.until_trial != 0) return;
  if (size.threads > 1 && useful < kPoor * size.threads) {
    size.trial = fewer(size.threads);
  } else if (size.threads < num_threads_) {
    size.trial = more(size.threads, num_threads_);
  }
}

void LoopSharing::end_trial(Size& size, double rate) {
  const bool is_fewer = size.trial < size.threads;
  const int trial = size.trial;
  size.trial = 0;
  if (rate >= (is_fewer ? kAsGood : kBetter) * size.rate) {
    size.threads = trial;
    size.rate = rate;
    size.pause = kFirstPause;
  } else {
    size.pause = std::min(kLastPause, 2 * size.pause);
  }
  size.until_trial = size.pause;
}

ThreadUse LoopSharing::use() const {
  const auto seconds = [](const std::atomic<std::uint64_t>& nanoseconds) {
    return static_cast<double>(nanoseconds.load(std::memory_order_relaxed)) / 1e9;
  };
  return {seconds(wall_), seconds(given_), seconds(wanted_)};
}

}  // namespace moerun
