#include "host/host_backend.h"

#include "runtime/cuda_backend.h"

namespace moerun::cuda_host {

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<cuda::CudaBackend>("cuda-host", 0);
}

}  // namespace moerun::cuda_host
