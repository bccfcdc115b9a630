// Limits and failures of the host's device that end with a test.
#pragma once

#include <cstdint>

#include "host/device.h"

namespace moerun::test {

// The device has so many bytes more than what is taken now.
class MemoryLimit {
 public:
  explicit MemoryLimit(std::size_t bytes, cuda_host::Place place = cuda_host::Place::device)
      : place_(place) {
    cuda_host::set_memory_limit(cuda_host::bytes_allocated(place) + bytes, place);
  }
  ~MemoryLimit() { cuda_host::set_memory_limit(SIZE_MAX, place_); }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;

 private:
  cuda_host::Place place_;
};

// The n-th kernel or copy fails, and the device with it, until this ends.
class FailureAfter {
 public:
  explicit FailureAfter(std::uint64_t n) { cuda_host::fail_after(n); }
  ~FailureAfter() { cuda_host::reset(); }
  FailureAfter(const FailureAfter&) = delete;
  FailureAfter& operator=(const FailureAfter&) = delete;
};

}  // namespace moerun::test
