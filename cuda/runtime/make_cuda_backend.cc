#include "device/cuda_backend.h"
#include "runtime/cuda_backend.h"

namespace moerun {

std::unique_ptr<Backend> make_cuda_backend() { return std::make_unique<cuda::CudaBackend>("cuda"); }

}  // namespace moerun
