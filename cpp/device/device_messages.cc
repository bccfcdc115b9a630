#include "device/device_messages.h"

#include <algorithm>
#include <iterator>

#include "base/bytes_text.h"

namespace moerun {
namespace {

// After one of these every further CUDA call of the process fails.
constexpr std::string_view kFinalErrors[] = {
    "cudaErrorAssert",
    "cudaErrorContextIsDestroyed",
    "cudaErrorECCUncorrectable",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalAddress",
    "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorTensorMemoryLeak",
    "cudaErrorContained",
};

}  // namespace

std::string memory_state_text(const MemoryState& memory) {
  const std::size_t used = memory.total_bytes - std::min(memory.free_bytes, memory.total_bytes);
  return message(bytes_text(memory.free_bytes), " are free: ", bytes_text(used), " of ",
                 bytes_text(memory.total_bytes),
                 " are in use by others (nvidia-smi lists processes) or by this process");
}

OutOfMemory out_of_device_memory(std::string_view what, std::size_t bytes,
                                 const MemoryState& memory) {
  return OutOfMemory(message(what, ": ", bytes_text(bytes),
                             " of device memory were asked for, but only ",
                             memory_state_text(memory)));
}

OutOfMemory out_of_device_memory(std::string_view what) {
  return OutOfMemory(message(what,
                             ": the device has no memory left for it; other processes may hold it "
                             "(nvidia-smi lists them)"));
}

OutOfMemory out_of_pinned_memory(std::string_view what, std::size_t bytes) {
  return OutOfMemory(message(
      what, ": the system refused ", bytes_text(bytes),
      " of page-locked memory; give a smaller --pin-limit (pin_limit), raise the limit of locked "
      "memory (ulimit -l), or free memory of the host"));
}

DeviceError device_failure(std::string_view what, std::string_view error_text,
                           std::string_view error_name) {
  const std::string text = message(what, ": ", error_text, " (", error_name, ")");
  if (std::find(std::begin(kFinalErrors), std::end(kFinalErrors), error_name) ==
      std::end(kFinalErrors)) {
    return DeviceError(text);
  }
  return DeviceError(message(text,
                             "; CUDA works no more in this process: start it again "
                             "(with CUDA_LAUNCH_BLOCKING=1 to see which kernel fails)"),
                     /*needs_restart=*/true);
}

}  // namespace moerun
