// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include "base/error.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Throws DeviceError, or OutOfMemory where memory ran out; `what` says what was tried.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report it again
  const auto text =
      message(what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw DeviceError(text);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
