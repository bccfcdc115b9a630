// A stream of the CUDA backend, with the memory that its operations need.
#pragma once

#include <cstddef>
#include <span>

#include "device/backend.h"
#include "kernels/expert_sum.h"
#include "runtime/runtime.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

class CudaStream final : public Stream {
 public:
  // For the lists of segments of a few layers, or the token ids of a prompt.
  static constexpr std::size_t kStagingBytes = 1 << 20;

  CudaStream();

  void synchronize() override;
  std::size_t scratch_bytes() const override;
  StreamHandle handle() const { return stream_.handle(); }

  // Copies `bytes` to the device behind what was issued before; the source may go at once. The
  // result is good for what is issued until the stream is synchronised next.
  const std::byte* stage(const void* source, std::size_t bytes);

  // At least so many floats, kept and grown between calls.
  float* floats(std::size_t count);
  float* partials(std::size_t count);
  std::byte* grouping(std::size_t bytes);

  ExpertWork experts;

 private:
  std::byte* grown(DeviceMemory& memory, std::size_t bytes, std::string_view what);

  DeviceStream stream_;
  DeviceMemory pinned_;
  DeviceMemory staged_;
  std::size_t num_staged_ = 0;
  DeviceMemory floats_;
  DeviceMemory partials_;
  DeviceMemory grouping_;
};

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
