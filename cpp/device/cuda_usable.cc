#include "device/cuda_usable.h"

#include <charconv>
#include <string_view>

#include "base/bytes_text.h"
#include "base/error.h"

namespace moerun {
namespace {

std::string version_text(int version) { return message(version / 1000, ".", version % 1000 / 10); }

// Machine code runs on the same major version from its minor version on; PTX on all that is newer,
// but only drivers as new as the compiler translate it. "sm_90a" is for exactly one
// version.
bool has_code_for(const CudaDevice& device, std::string_view architecture, bool translates_ptx) {
  const std::size_t underscore = architecture.find('_');
  if (underscore == std::string_view::npos) return false;
  const std::string_view digits = architecture.substr(underscore + 1);
  int number = 0;
  const char* last = digits.data() + digits.size();
  const auto parsed = std::from_chars(digits.data(), last, number);
  if (parsed.ec != std::errc{}) return false;
  const int major = number / 10;
  const int minor = number % 10;
  const bool is_ptx = architecture.substr(0, underscore) == "compute";
  if (is_ptx && !translates_ptx) return false;
  const bool is_same_major = device.compute_capability_major == major;
  if (parsed.ptr != last && *parsed.ptr == 'a') {
    return is_same_major && device.compute_capability_minor == minor;
  }
  return (is_same_major && device.compute_capability_minor >= minor) ||
         (is_ptx && device.compute_capability_major > major);
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string why_unusable(const CudaInfo& info, CudaAnswer answer, const std::string& failure) {
  if (info.driver_version == 0 && answer != CudaAnswer::failed) {
    return "no NVIDIA driver is installed";
  }
  if (answer == CudaAnswer::failed) return failure;
  if (answer == CudaAnswer::driver_too_old) {
    return message("the NVIDIA driver supports CUDA ", version_text(info.driver_version),
                   ", and this build needs ", version_text(info.runtime_version),
                   "; update the driver");
  }
  if (answer == CudaAnswer::no_device || info.devices.empty()) {
    return "the NVIDIA driver finds no device (an empty CUDA_VISIBLE_DEVICES hides them all)";
  }
  std::string found;
  for (const auto& device : info.devices) {
    found += (found.empty() ? "" : ", ") + device_text(device);
  }
  return message("found ", found, ", but this build has code for ", joined(info.architectures),
                 " only; build it with -DCMAKE_CUDA_ARCHITECTURES=native",
                 info.driver_version < info.runtime_version ? ", or update the driver" : "");
}

}  // namespace

std::string device_text(const CudaDevice& device) {
  return message(device.name, " (sm_", device.compute_capability_major,
                 device.compute_capability_minor, ", ", bytes_text(device.total_memory_bytes), ")");
}

void judge_cuda(CudaInfo& info, CudaAnswer answer, const std::string& failure) {
  info.available = false;
  info.usable_device = -1;
  const bool translates_ptx = info.driver_version >= info.runtime_version;
  if (answer == CudaAnswer::devices) {
    for (std::size_t i = 0; i < info.devices.size() && !info.available; ++i) {
      for (const auto& architecture : info.architectures) {
        if (!has_code_for(info.devices[i], architecture, translates_ptx)) continue;
        info.available = true;
        info.usable_device = static_cast<int>(i);
        break;
      }
    }
  }
  info.reason = info.available ? "" : why_unusable(info, answer, failure);
}

}  // namespace moerun
