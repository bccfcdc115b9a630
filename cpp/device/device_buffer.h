// Memory that a device computes in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moerun {

// What memory is for decides where it comes from.
enum class MemoryUse {
  streamed,  // read from end to end again and again
  grown,     // reserved for the most that may come, filled bit by bit
  shared,    // page-locked memory of the host, which the device reads and writes, too
};

// Owns it. Zeroed when it is new.
class DeviceBuffer {
 public:
  virtual ~DeviceBuffer() = default;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 protected:
  DeviceBuffer(std::byte* data, std::size_t size) : data_(data), size_(size) {}

 private:
  std::byte* data_;
  std::size_t size_;
};

}  // namespace moerun
