#include "runtime/cuda_stream.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "kernels/router.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

CudaStream::CudaStream()
    : flags_(kMaxRouters * sizeof(std::uint32_t), "flags", DeviceMemory::Place::pinned_host),
      router_memory_(kMaxRouters * sizeof(RouterMemory), "routers"),
      pinned_(kStagingBytes, "arguments of kernels", DeviceMemory::Place::pinned_host),
      staged_(kStagingBytes, "arguments of kernels") {
  std::memset(flags_.data(), 0, flags_.size());
  fill_with_zeros(router_memory_);
}

CudaStream::~CudaStream() {
  try {
    stream_.synchronize();  // before its memory goes
  } catch (...) {           // the device has failed, and has said so to a call that can throw
  }
}

void CudaStream::synchronize() {
  stream_.synchronize();
  num_staged_ = 0;
}

std::size_t CudaStream::scratch_bytes() const {
  return staged_.size() + floats_.size() + partials_.size() + grouping_.size();
}

const std::byte* CudaStream::stage(const void* source, std::size_t bytes) {
  if (bytes > kStagingBytes) {
    throw InvalidArgument(message("arguments of a kernel: expected at most ", kStagingBytes,
                                  " bytes, found ", bytes));
  }
  if (is_recording_) throw Error("arguments from the host cannot be part of a recording");
  if (num_staged_ + bytes > kStagingBytes) synchronize();
  std::byte* pinned = pinned_.data() + num_staged_;
  std::byte* staged = staged_.data() + num_staged_;
  std::memcpy(pinned, source, bytes);
  copy_async(handle(), staged, pinned, bytes);
  num_staged_ += (bytes + 63) / 64 * 64;
  return staged;
}

Announcement CudaStream::next_announcement(std::size_t index) {
  return {flags_.as<std::uint32_t>() + index, ++announced_[index]};
}

void CudaStream::choose_in_one(const RouterParams& params, std::span<const RouteRequest> requests) {
  std::vector<Announcement> announcements;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const bool is_announced = requests[i].on_host.expert_ids != nullptr;
    announcements.push_back(is_announced ? next_announcement(i) : Announcement{});
  }
  choose_experts(handle(), params, requests, router_memory_.as<RouterMemory>(), announcements);
}

void CudaStream::send_choice(std::size_t index, const RouteRequest& request) {
  const Announcement announcement = next_announcement(index);
  send_routing(handle(), request.routing, request.on_host, announcement.flag, announcement.value);
}

void CudaStream::wait_for_choice(std::size_t index) {
  wait_for_flag(handle(), flags_.as<std::uint32_t>() + index, announced_[index]);
}

float* CudaStream::floats(std::size_t count) {
  return reinterpret_cast<float*>(grown(floats_, count * sizeof(float), "attention"));
}

float* CudaStream::partials(std::size_t count) {
  return reinterpret_cast<float*>(grown(partials_, count * sizeof(float), "sums of experts"));
}

std::byte* CudaStream::grouping(std::size_t bytes) {
  return grown(grouping_, bytes, "tokens by expert");
}

std::byte* CudaStream::grown(DeviceMemory& memory, std::size_t bytes, std::string_view what) {
  if (memory.size() < bytes) {
    if (is_recording_) throw Error("scratch memory cannot grow in a recording");
    synchronize();         // what is under way may still use the old one
    ++memory_generation_;  // also where the new one is refused
    memory = {};
    memory = DeviceMemory(bytes, what);
  }
  return memory.data();
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
