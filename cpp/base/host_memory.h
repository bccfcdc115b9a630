// Large blocks of host memory straight from the operating system, on huge pages where it has them.
#pragma once

#include <cstddef>
#include <string_view>
#include <utility>

#include "base/view.h"

namespace moerun {

// Huge pages for what is streamed; small ones for what is reserved large and filled bit by bit, for
// a touched page is taken whole.
enum class PageSize { huge, small };

class HostMemory {
 public:
  HostMemory() = default;
  // Zeroed, page-aligned. Pages are taken from the system when first touched. Throws OutOfMemory
  // saying `what` the memory was for.
  HostMemory(std::size_t bytes, std::string_view what, PageSize pages = PageSize::huge);
  ~HostMemory();
  HostMemory(HostMemory&& other) noexcept { swap(other); }
  HostMemory& operator=(HostMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  Bytes bytes() const { return {data_, size_}; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void swap(HostMemory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Bytes of physical memory that can be had without swapping, within the cgroup's limit.
std::size_t available_memory_bytes();
// Bytes of physical memory that the machine has.
std::size_t total_memory_bytes();

}  // namespace moerun
