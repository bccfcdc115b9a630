// The CUDA backend on the host's stand-in for a device, for tests.
#pragma once

#include <cstddef>
#include <memory>

#include "device/backend.h"
#include "device/cuda_bandwidth.h"

namespace moerun::cuda_host {

std::unique_ptr<Backend> make_backend();
// Of the host, by the same code: it shows that the code works.
CudaBandwidth measure_bandwidth(std::size_t bytes);

}  // namespace moerun::cuda_host
