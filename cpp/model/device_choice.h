// Which device a model runs on, and why.
#pragma once

#include <memory>
#include <string>

#include "device/backend.h"
#include "device/cuda_query.h"

namespace moerun {

struct DeviceChoice {
  std::string device;  // "cpu" or "cuda"
  std::string reason;
};

// `requested`: auto, cpu or cuda. auto is CUDA where `cuda` says that it can be had. Throws
// InvalidArgument for a name that is unknown, or for a device that cannot be had.
DeviceChoice choose_device(const std::string& requested, const CudaInfo& cuda);

// The backend of what was chosen. A device that was found but cannot be used after all is an error,
// also where nobody asked for it by name: OutOfMemory, DeviceError.
std::unique_ptr<Backend> make_backend(const DeviceChoice& choice, int threads,
                                      const std::string& cpu_kernels);

}  // namespace moerun
