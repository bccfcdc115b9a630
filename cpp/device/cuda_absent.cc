// Stands in for cuda/ in builds without it.
#include "base/error.h"
#include "device/cuda_backend.h"
#include "device/cuda_bandwidth.h"
#include "device/cuda_query.h"

namespace moerun {

CudaInfo query_cuda() noexcept {
  CudaInfo info;
  info.reason = "this build has no CUDA part (nvcc was not found when it was built)";
  return info;
}

std::unique_ptr<Backend> make_cuda_backend() {
  throw InvalidArgument("device: this build has no CUDA part");
}

CudaBandwidth measure_cuda_bandwidth(std::size_t) {
  throw InvalidArgument("device: this build has no CUDA part");
}

}  // namespace moerun
