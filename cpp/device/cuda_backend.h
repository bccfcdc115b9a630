// The CUDA device. Linked from cuda/ where it is built, else from cuda_absent.cc.
#pragma once

#include <memory>

#include "device/backend.h"

namespace moerun {

// On the current device. Throws DeviceError, or InvalidArgument in a build without CUDA.
std::unique_ptr<Backend> make_cuda_backend();

}  // namespace moerun
