// The device of runtime/runtime.h on the host.
#include "runtime/runtime.h"

#include <algorithm>
#include <string>

#include "host/device.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

DeviceStream::DeviceStream(Priority) { handle_.value = cuda_host::make_stream(); }

DeviceStream::~DeviceStream() {
  try {
    cuda_host::destroy_stream(handle_.value);
  } catch (...) {  // reported by the call that waited
  }
}

void DeviceStream::synchronize() { cuda_host::synchronize_stream(handle_.value); }

DeviceEvent::DeviceEvent() : value_(cuda_host::make_event()) {}
DeviceEvent::~DeviceEvent() { cuda_host::destroy_event(value_); }
void DeviceEvent::record(StreamHandle stream) { cuda_host::record_event(stream.value, value_); }
void DeviceEvent::make_wait(StreamHandle stream) const {
  cuda_host::wait_for_event(stream.value, value_);
}
bool DeviceEvent::is_done() const { return cuda_host::is_event_done(value_); }
void DeviceEvent::synchronize() const { cuda_host::synchronize_event(value_); }

DeviceMemory::DeviceMemory(std::size_t bytes, std::string_view what, Place place)
    : size_(bytes), place_(place) {
  data_ = static_cast<std::byte*>(cuda_host::allocate(
      bytes, std::string(what).c_str(),
      place == Place::device ? cuda_host::Place::device : cuda_host::Place::page_locked));
}

DeviceMemory::~DeviceMemory() {
  try {
    cuda_host::free_memory(data_);
  } catch (...) {  // a destructor cannot throw: the device remembers it for the next call
    cuda_host::spoil(std::current_exception());
  }
}

void copy_async(StreamHandle stream, std::byte* destination, const std::byte* source,
                std::size_t bytes) {
  cuda_host::issue_copy(stream.value, destination, source, bytes);
}

void fill_with_zeros(const DeviceMemory& memory) {
  std::fill_n(memory.data(), memory.size(), std::byte{0});
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
