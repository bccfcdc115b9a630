#include "host/host_backend.h"

#include "runtime/bandwidth.h"
#include "runtime/cuda_backend.h"

namespace moerun::cuda_host {

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<cuda::CudaBackend>("cuda-host", 0);
}

CudaBandwidth measure_bandwidth(std::size_t bytes) { return cuda::measure_bandwidth(bytes); }

}  // namespace moerun::cuda_host
