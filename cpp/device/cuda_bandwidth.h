// The limits that the CUDA device is held against. Linked from cuda/ where it is built, else from
// cuda_absent.cc.
#pragma once

#include <cstddef>

namespace moerun {

// Best of several passes, in GB/s (10^9 bytes).
struct CudaBandwidth {
  double read = 0;       // of device memory, by a kernel that does nothing else
  double copy = 0;       // within device memory; bytes read and written
  double from_host = 0;  // from page-locked memory of the host to the device
};

// Moves `bytes` at a time: more than caches hold. Throws DeviceError, OutOfMemory, or
// InvalidArgument for less than 256 KiB and in a build without CUDA.
CudaBandwidth measure_cuda_bandwidth(std::size_t bytes);

}  // namespace moerun
