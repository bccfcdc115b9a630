// An estimate of how long one thread takes for a loop: whether it is worth sharing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moerun {

struct LoopWork {
  std::size_t bytes = 0;          // read or written, each counted once
  std::size_t multiply_adds = 0;  // of all items

  // As a fast core does it with data in its caches: 32 bytes or 64 multiply-adds a nanosecond.
  std::uint64_t nanoseconds() const { return bytes / 32 + multiply_adds / 64; }
};

}  // namespace moerun
