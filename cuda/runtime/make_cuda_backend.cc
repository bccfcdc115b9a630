#include "base/error.h"
#include "device/cuda_backend.h"
#include "device/cuda_bandwidth.h"
#include "device/cuda_query.h"
#include "runtime/bandwidth.h"
#include "runtime/cuda_backend.h"

namespace moerun {

std::unique_ptr<Backend> make_cuda_backend() {
  const CudaInfo info = query_cuda();
  if (!info.available) throw InvalidArgument("device: no CUDA: " + info.reason);
  auto backend = std::make_unique<cuda::CudaBackend>("cuda", info.usable_device);
  backend->make_current();
  return backend;
}

CudaBandwidth measure_cuda_bandwidth(std::size_t bytes) {
  make_cuda_backend();  // makes its device the current one, or says why there is none
  return cuda::measure_bandwidth(bytes);
}

}  // namespace moerun
