// The one place that launches kernels.
#pragma once

#include <cstddef>
#include <cstdint>

// Compiled for the device by nvcc, or for the host with MOERUN_CUDA_HOST; what only calls the
// functions of kernels needs neither.
#if defined(__CUDACC__)
#include <cuda_runtime.h>

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

#if defined(__CUDACC__) || defined(MOERUN_CUDA_HOST)
// Issues kKernel(arguments) to the stream and returns. What the arguments point to must live until
// it has run. `name` stands in messages.
template <auto kKernel, typename Arguments>
void launch(StreamHandle stream, const LaunchShape& shape, const Arguments& arguments,
            const char* name) {
#if defined(__CUDACC__)
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          name);
  }
  const dim3 blocks(shape.blocks_x, shape.blocks_y, shape.blocks_z);
  kKernel<<<blocks, shape.threads, shape.shared_bytes, static_cast<cudaStream_t>(stream.value)>>>(
      arguments);
  check(cudaGetLastError(), name);
#else
  cuda_host::issue_kernel(
      stream.value,
      {{shape.blocks_x, shape.blocks_y, shape.blocks_z}, {shape.threads, 1, 1}, shape.shared_bytes},
      [arguments] { kKernel(arguments); }, name);
#endif
}
#endif

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
