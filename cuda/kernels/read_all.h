// Reading memory from front to back and doing nothing else: the limit that decoding is held
// against.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// `bytes` is rounded down to this.
inline constexpr std::size_t kReadBlockBytes = std::size_t{256} << 10;

// `sink`: for one number, which is hardly ever written.
void read_all(StreamHandle stream, const std::byte* data, std::size_t bytes, std::uint32_t* sink);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
