// What is said when a device refuses something: apart from the calls that find it out, so that the
// texts can be tested without a device.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "base/error.h"
#include "device/memory_state.h"

namespace moerun {

// "3 GiB of 79.1 GiB are free, the rest is in use already ..."
std::string memory_state_text(const MemoryState& memory);

// `what` the memory was for stands first in all of these.
OutOfMemory out_of_device_memory(std::string_view what, std::size_t bytes,
                                 const MemoryState& memory);
// Where nobody knows how much: the device has too little even to begin with.
OutOfMemory out_of_device_memory(std::string_view what);
OutOfMemory out_of_pinned_memory(std::string_view what, std::size_t bytes);

// `error_text` and `error_name` as the CUDA runtime gives them. Errors that end the CUDA context of
// the process say so.
DeviceError device_failure(std::string_view what, std::string_view error_text,
                           std::string_view error_name);

}  // namespace moerun
