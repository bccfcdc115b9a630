#include "runtime/bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>

#include "base/error.h"
#include "kernels/read_all.h"
#include "runtime/runtime.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr int kPasses = 5;
// Issued together, so that waiting for them is a small part of the time.
constexpr int kRepeats = 8;

// GB/s of the best pass, where `issue` moves `bytes` bytes.
double best_rate(DeviceStream& stream, std::size_t bytes, const std::function<void()>& issue) {
  issue();
  stream.synchronize();
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    for (int repeat = 0; repeat < kRepeats; ++repeat) issue();
    stream.synchronize();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(bytes) * kRepeats / 1e9 / elapsed.count());
  }
  return best;
}

}  // namespace

CudaBandwidth measure_bandwidth(std::size_t bytes) {
  bytes = bytes / kReadBlockBytes * kReadBlockBytes;
  if (bytes == 0) {
    throw InvalidArgument(message("bytes: expected at least ", kReadBlockBytes));
  }
  const char* what = "measuring bandwidth";
  const DeviceMemory first(bytes, what);
  const DeviceMemory second(bytes, what);
  const DeviceMemory sink(sizeof(std::uint32_t), what);
  const DeviceMemory host(bytes, what, DeviceMemory::Place::pinned_host);
  std::memset(host.data(), 1, bytes);
  fill_with_zeros(first);
  DeviceStream stream;
  const StreamHandle handle = stream.handle();
  CudaBandwidth result;
  result.read = best_rate(stream, bytes,
                          [&] { read_all(handle, first.data(), bytes, sink.as<std::uint32_t>()); });
  result.copy =
      best_rate(stream, 2 * bytes, [&] { copy_async(handle, second.data(), first.data(), bytes); });
  result.from_host =
      best_rate(stream, bytes, [&] { copy_async(handle, first.data(), host.data(), bytes); });
  return result;
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
