#include "device/cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "base/error.h"
#include "base/host_memory.h"
#include "base/thread_pool.h"
#include "device/cpu/kernel_table.h"

namespace moerun {
namespace {

constexpr int kPasses = 5;
constexpr std::size_t kBlock = std::size_t{4} << 20;  // what a thread takes at a time

}  // namespace

double measure_read_bandwidth(int threads, std::size_t bytes) {
  ThreadPool pool(threads);
  const std::size_t blocks = bytes / kBlock;
  if (blocks < 4 * static_cast<std::size_t>(threads)) {
    throw InvalidArgument(message("bytes: expected at least 16 MiB a thread, found ", bytes));
  }
  const HostMemory memory(blocks * kBlock, "measuring the read bandwidth");
  pool.parallel_for(blocks, [&](std::size_t block, int) {
    std::memset(memory.data() + block * kBlock, 1, kBlock);
  });
  const CpuKernels& kernels = choose_cpu_kernels("auto");
  std::atomic<float> sink{0};  // the compiler may not drop what is used
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    pool.parallel_for(blocks, [&](std::size_t block, int) {
      const auto* data = reinterpret_cast<const float*>(memory.data() + block * kBlock);
      sink.store(kernels.read_all(data, kBlock / sizeof(float)), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(blocks * kBlock) / 1e9 / elapsed.count());
  }
  return best;
}

}  // namespace moerun
