#include "runtime/cuda_stream.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

CudaStream::CudaStream()
    : pinned_(kStagingBytes, "arguments of kernels", DeviceMemory::Place::pinned_host),
      staged_(kStagingBytes, "arguments of kernels") {}

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
  if (num_staged_ + bytes > kStagingBytes) synchronize();
  std::byte* pinned = pinned_.data() + num_staged_;
  std::byte* staged = staged_.data() + num_staged_;
  std::memcpy(pinned, source, bytes);
  copy_async(handle(), staged, pinned, bytes);
  num_staged_ += (bytes + 63) / 64 * 64;
  return staged;
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
    synchronize();  // what is under way may still use the old one
    memory = {};
    memory = DeviceMemory(bytes, what);
  }
  return memory.data();
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
