// The limit that decoding is held against.
#pragma once

#include <cstddef>

namespace moerun {

// GB/s (10^9 bytes) at which `threads` threads together read `bytes` bytes of memory from front to
// back: the best of several passes. Throws InvalidArgument for less than 16 MiB a thread.
double measure_read_bandwidth(int threads, std::size_t bytes);

}  // namespace moerun
