// A stream of the CUDA backend, with the memory that its operations need.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "device/backend.h"
#include "kernels/choose_experts.h"
#include "kernels/expert_sum.h"
#include "runtime/runtime.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

class CudaStream final : public Stream {
 public:
  // For the lists of segments of a few layers, or the token ids of a prompt.
  static constexpr std::size_t kStagingBytes = 1 << 20;

  CudaStream();
  ~CudaStream() override;

  void synchronize() override;
  std::size_t scratch_bytes() const override;
  StreamHandle handle() const { return stream_.handle(); }

  // Copies `bytes` to the device behind what was issued before; the source may go at once. The
  // result is good for what is issued until the stream is synchronised next.
  const std::byte* stage(const void* source, std::size_t bytes);

  // Issues the choices that can be made in one launch; the others, and what is not asked of the
  // host, are the caller's. The host is told through flags, one a request.
  void choose_in_one(const RouterParams& params, std::span<const RouteRequest> requests);
  void send_choice(std::size_t index, const RouteRequest& request);
  // Waits until the host has been told of the last choice with this number.
  void wait_for_choice(std::size_t index);

  // Changes whenever scratch memory has been replaced.
  std::uint64_t memory_generation() const { return memory_generation_; }
  void begin_recording() { is_recording_ = true; }
  void end_recording() { is_recording_ = false; }

  // At least so many floats, kept and grown between calls.
  float* floats(std::size_t count);
  float* partials(std::size_t count);
  std::byte* grouping(std::size_t bytes);

  ExpertWork experts;

 private:
  std::byte* grown(DeviceMemory& memory, std::size_t bytes, std::string_view what);

  Announcement next_announcement(std::size_t index);

  DeviceStream stream_;
  DeviceMemory flags_;  // (kMaxRouters) of the host
  std::uint32_t announced_[kMaxRouters] = {};
  DeviceMemory router_memory_;
  std::uint64_t memory_generation_ = 0;
  bool is_recording_ = false;
  DeviceMemory pinned_;
  DeviceMemory staged_;
  std::size_t num_staged_ = 0;
  DeviceMemory floats_;
  DeviceMemory partials_;
  DeviceMemory grouping_;
};

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
