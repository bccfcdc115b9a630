// How full the memory of a device is.
#pragma once

#include <cstddef>

namespace moerun {

struct MemoryState {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;  // with what this and other processes take
};

}  // namespace moerun
