// Whether CUDA devices can be had, without any CUDA type. Linked from cuda/ where it is built, else
// from cuda_absent.cc.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace moerun {

struct CudaDevice {
  std::string name;
  int compute_capability_major = 0;
  int compute_capability_minor = 0;
  std::size_t total_memory_bytes = 0;
};

struct CudaInfo {
  bool compiled = false;   // this build has the CUDA part
  bool available = false;  // and finds a driver that is new enough, and a device it has code for
  int usable_device = -1;  // the first such device; CUDA_VISIBLE_DEVICES chooses among several
  std::string reason;      // why it is not available
  int driver_version = 0;  // 13000 for 13.0; 0: none
  int runtime_version = 0;
  std::vector<CudaDevice> devices;
  std::vector<std::string> architectures;  // that this build has code for, as "sm_90"
};

// Never throws.
CudaInfo query_cuda() noexcept;

}  // namespace moerun
