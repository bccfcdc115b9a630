// How fast a device reads and copies its memory, and how fast the link to the host is.
#pragma once

#include <cstddef>

#include "device/cuda_bandwidth.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

CudaBandwidth measure_bandwidth(std::size_t bytes);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
