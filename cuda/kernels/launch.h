// The one place that launches kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"

// Compiled for the device by nvcc, or for the host with MOERUN_CUDA_HOST; what only calls the
// functions of kernels needs neither.
#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "runtime/check.h"
#elif defined(MOERUN_CUDA_HOST)
#include "host/device.h"
#endif

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// A queue of work on the device, owned elsewhere.
struct StreamHandle {
  void* value = nullptr;
};

struct LaunchShape {
  unsigned blocks_x = 1;
  unsigned blocks_y = 1;
  unsigned blocks_z = 1;
  unsigned threads = 32;  // a multiple of 32, at most 1024
  std::size_t shared_bytes = 0;
};

// Throws DeviceError where a block of the kernel `name` needs more shared memory than it can have.
inline void require_shared_bytes(const char* name, std::size_t needed, std::size_t available) {
  if (needed <= available) return;
  throw DeviceError(message(name, " needs ", needed, " bytes of shared memory for a block, and ",
                            available,
                            " is the most that this device gives; use another card or the CPU"));
}

#if defined(__CUDACC__)
// What every kernel may use without asking, on every device.
inline constexpr std::size_t kSharedBytesOfAll = 48 * 1024;

// What a block can have on the current device.
inline std::size_t max_shared_bytes() {
  int device = 0;
  int available = 0;
  check(cudaGetDevice(&device), "asking for shared memory");
  check(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for shared memory");
  return static_cast<std::size_t>(available);
}

// Asks the current device for so much shared memory for blocks of the kernel, once for each size
// that is larger than those before. From any thread.
template <auto kKernel>
void allow_shared_bytes(std::size_t bytes, const char* name) {
  static std::mutex mutex;
  static std::map<int, std::size_t> allowed;  // by device
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard lock(mutex);
  std::size_t& most = allowed[device];
  if (bytes <= most) return;
  require_shared_bytes(name, bytes, max_shared_bytes());
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        name);
  most = bytes;
}
#elif defined(MOERUN_CUDA_HOST)
inline std::size_t max_shared_bytes() { return cuda_host::kMaxSharedBytes; }
#endif

#if defined(__CUDACC__) || defined(MOERUN_CUDA_HOST)
// Issues kKernel(arguments) to the stream and returns. What the arguments point to must live until
// it has run. `name` stands in messages. Throws DeviceError, having issued nothing.
template <auto kKernel, typename Arguments>
void launch(StreamHandle stream, const LaunchShape& shape, const Arguments& arguments,
            const char* name) {
#if defined(__CUDACC__)
  if (shape.shared_bytes > kSharedBytesOfAll) {
    allow_shared_bytes<kKernel>(shape.shared_bytes, name);
  }
  (void)cudaGetLastError();  // of a call whose failure nobody could be told of
  const dim3 blocks(shape.blocks_x, shape.blocks_y, shape.blocks_z);
  kKernel<<<blocks, shape.threads, shape.shared_bytes, static_cast<cudaStream_t>(stream.value)>>>(
      arguments);
  check(cudaGetLastError(), name);
#else
  require_shared_bytes(name, shape.shared_bytes, cuda_host::kMaxSharedBytes);
  cuda_host::issue_kernel(
      stream.value,
      {{shape.blocks_x, shape.blocks_y, shape.blocks_z}, {shape.threads, 1, 1}, shape.shared_bytes},
      [arguments] { kKernel(arguments); }, name);
#endif
}
#endif

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
