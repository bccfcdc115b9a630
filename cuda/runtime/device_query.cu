// query_cuda(): asks the driver what is there. Changes no device's state, needs no driver to link.
#include <cuda_runtime.h>

#include <sstream>
#include <string>

#include "device/cuda_query.h"
#include "device/cuda_usable.h"

namespace moerun {
namespace {

// Names such as "sm_80" and "compute_90", from the build.
std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  std::istringstream list(MOERUN_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

std::string failure(const char* call, cudaError_t error) {
  (void)cudaGetLastError();  // or the next launch would report it again
  return std::string(call) + ": " + cudaGetErrorString(error);
}

void query(CudaInfo& info) {
  info.architectures = compiled_architectures();
  if (const cudaError_t error = cudaRuntimeGetVersion(&info.runtime_version)) {
    return judge_cuda(info, CudaAnswer::failed, failure("cudaRuntimeGetVersion", error));
  }
  if (const cudaError_t error = cudaDriverGetVersion(&info.driver_version)) {
    return judge_cuda(info, CudaAnswer::failed, failure("cudaDriverGetVersion", error));
  }
  int num_devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&num_devices)) {
    const CudaAnswer answer = error == cudaErrorInsufficientDriver ? CudaAnswer::driver_too_old
                              : error == cudaErrorNoDevice         ? CudaAnswer::no_device
                                                                   : CudaAnswer::failed;
    return judge_cuda(info, answer, failure("cudaGetDeviceCount", error));
  }
  for (int device_idx = 0; device_idx < num_devices; ++device_idx) {
    cudaDeviceProp properties{};
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, device_idx)) {
      return judge_cuda(info, CudaAnswer::failed, failure("cudaGetDeviceProperties", error));
    }
    info.devices.push_back(
        {properties.name, properties.major, properties.minor, properties.totalGlobalMem});
  }
  judge_cuda(info, CudaAnswer::devices, "");
}

}  // namespace

CudaInfo query_cuda() noexcept {
  CudaInfo info;
  info.compiled = true;
  try {
    query(info);
  } catch (const std::exception&) {  // out of memory
    info.available = false;
  }
  return info;
}

}  // namespace moerun
