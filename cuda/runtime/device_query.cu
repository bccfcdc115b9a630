// query_cuda(): asks the driver what is there. Changes no device's state, needs no driver to link.
#include <cuda_runtime.h>

#include <sstream>
#include <string>
#include <utility>

#include "device/cuda_query.h"

namespace moerun {
namespace {

// Names such as "sm_80" and "compute_90", from the build.
std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  std::istringstream list(MOERUN_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

// Machine code runs on the same major version from its minor version on; PTX on all that is newer.
// Names with a letter ("sm_90a") are for exactly one version.
bool has_code_for(const CudaDevice& device, const std::string& architecture) {
  const std::size_t underscore = architecture.find('_');
  const int number = std::stoi(architecture.substr(underscore + 1));
  const int major = number / 10;
  const int minor = number % 10;
  if (architecture.back() == 'a') {
    return device.compute_capability_major == major && device.compute_capability_minor == minor;
  }
  const bool is_ptx = architecture.compare(0, underscore, "compute") == 0;
  const bool is_newer_major = device.compute_capability_major > major;
  const bool is_same_major = device.compute_capability_major == major;
  return (is_same_major && device.compute_capability_minor >= minor) || (is_ptx && is_newer_major);
}

bool has_code_for(const CudaDevice& device, const std::vector<std::string>& architectures) {
  for (const auto& architecture : architectures) {
    if (has_code_for(device, architecture)) return true;
  }
  return false;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string failure(const char* call, cudaError_t error) {
  (void)cudaGetLastError();  // or the next launch would report it again
  return std::string(call) + ": " + cudaGetErrorString(error);
}

void query(CudaInfo& info) {
  info.architectures = compiled_architectures();
  if (const cudaError_t error = cudaRuntimeGetVersion(&info.runtime_version)) {
    info.reason = failure("cudaRuntimeGetVersion", error);
    return;
  }
  if (const cudaError_t error = cudaDriverGetVersion(&info.driver_version)) {
    info.reason = failure("cudaDriverGetVersion", error);
    return;
  }
  if (info.driver_version == 0) {
    info.reason = "no NVIDIA driver is installed";
    return;
  }
  int num_devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&num_devices)) {
    info.reason = failure("cudaGetDeviceCount", error);
    if (error == cudaErrorInsufficientDriver) {
      info.reason = "the NVIDIA driver supports CUDA " + version_text(info.driver_version) +
                    ", and this build needs " + version_text(info.runtime_version) +
                    "; update the driver";
    }
    return;
  }
  for (int device_idx = 0; device_idx < num_devices; ++device_idx) {
    cudaDeviceProp properties{};
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, device_idx)) {
      info.reason = failure("cudaGetDeviceProperties", error);
      return;
    }
    CudaDevice device{properties.name, properties.major, properties.minor,
                      properties.totalGlobalMem};
    info.available = info.available || has_code_for(device, info.architectures);
    info.devices.push_back(std::move(device));
  }
  if (!info.available) {
    info.reason =
        "this build has code for " MOERUN_CUDA_ARCHITECTURES " only, and no device here runs that";
  }
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
