// Stands in for cuda/ in builds without it.
#include "device/cuda_query.h"

namespace moerun {

CudaInfo query_cuda() noexcept {
  CudaInfo info;
  info.reason = "this build has no CUDA part (nvcc was not found when it was built)";
  return info;
}

}  // namespace moerun
