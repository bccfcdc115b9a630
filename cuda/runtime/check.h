// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include "device/device_messages.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Throws DeviceError, or OutOfMemory where memory ran out; `what` says what was tried.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report it again
  if (error == cudaErrorMemoryAllocation) throw out_of_device_memory(what);
  throw device_failure(what, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
