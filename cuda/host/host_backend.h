// The CUDA backend on the host's stand-in for a device, for tests.
#pragma once

#include <memory>

#include "device/backend.h"

namespace moerun::cuda_host {

std::unique_ptr<Backend> make_backend();

}  // namespace moerun::cuda_host
