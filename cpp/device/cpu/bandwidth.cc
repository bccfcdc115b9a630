#include "device/cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "base/error.h"
#include "base/host_memory.h"
#include "base/thread_pool.h"

namespace moerun {
namespace {

constexpr int kPasses = 5;
constexpr std::size_t kBlock = std::size_t{256} << 10;  // what a thread takes at a time

// Wide loads and nothing else; the compiler may not drop them, for the result is used.
std::uint64_t read_block(const std::byte* data, std::size_t bytes) {
  typedef std::uint64_t Lanes __attribute__((vector_size(64), aligned(64)));
  const auto* lanes = reinterpret_cast<const Lanes*>(data);
  Lanes sums[4] = {};
  for (std::size_t i = 0; i + 4 <= bytes / sizeof(Lanes); i += 4) {
    for (std::size_t j = 0; j < 4; ++j) {
      sums[j] |= lanes[i + j];
      // Asking ahead reads faster than the hardware's own prefetcher where that stops at pages.
      __builtin_prefetch(reinterpret_cast<const std::byte*>(lanes + i + j) + 4096);
    }
  }
  const Lanes all = (sums[0] | sums[1]) | (sums[2] | sums[3]);
  std::uint64_t result = 0;
  for (int lane = 0; lane < 8; ++lane) result |= all[lane];
  return result;
}

}  // namespace

double measure_read_bandwidth(int threads, std::size_t bytes) {
  ThreadPool pool(threads);
  const std::size_t blocks = bytes / kBlock;
  if (blocks < 4 * static_cast<std::size_t>(threads)) {
    throw InvalidArgument(message("bytes: expected at least 1 MiB a thread, found ", bytes));
  }
  const HostMemory memory(blocks * kBlock, "measuring the read bandwidth");
  pool.parallel_for(blocks, [&](std::size_t block, int) {
    std::memset(memory.data() + block * kBlock, 1, kBlock);
  });
  std::atomic<std::uint64_t> sink{0};
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    pool.parallel_for(blocks, [&](std::size_t block, int) {
      sink.fetch_or(read_block(memory.data() + block * kBlock, kBlock), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(blocks * kBlock) / 1e9 / elapsed.count());
  }
  return best;
}

}  // namespace moerun
