// Whether what the CUDA driver has found can be used by this build, and if not, why: apart from the
// calls that ask the driver, so that it can be tested without one.
#pragma once

#include <string>

#include "device/cuda_query.h"

namespace moerun {

// How asking for the devices ended.
enum class CudaAnswer { devices, driver_too_old, no_device, failed };

// Sets available, usable_device and reason from the other fields. `failure` is the call that failed
// and why; used with CudaAnswer::failed.
void judge_cuda(CudaInfo& info, CudaAnswer answer, const std::string& failure);

// "NVIDIA H100 PCIe (sm_90, 79.1 GiB)"
std::string device_text(const CudaDevice& device);

}  // namespace moerun
