// The CUDA device. Linked from cuda/ where it is built, else from cuda_absent.cc.
#pragma once

#include <memory>

#include "device/backend.h"

namespace moerun {

// On the first device that this build can use, made current on this thread. Throws DeviceError,
// OutOfMemory where the device has no memory left to begin with, or InvalidArgument where there is
// no such device.
std::unique_ptr<Backend> make_cuda_backend();

}  // namespace moerun
