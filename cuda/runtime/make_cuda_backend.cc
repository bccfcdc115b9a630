#include "device/cuda_backend.h"
#include "device/cuda_bandwidth.h"
#include "runtime/bandwidth.h"
#include "runtime/cuda_backend.h"

namespace moerun {

std::unique_ptr<Backend> make_cuda_backend() { return std::make_unique<cuda::CudaBackend>("cuda"); }

CudaBandwidth measure_cuda_bandwidth(std::size_t bytes) { return cuda::measure_bandwidth(bytes); }

}  // namespace moerun
