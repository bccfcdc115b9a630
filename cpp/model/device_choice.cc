#include "model/device_choice.h"

#include "base/error.h"
#include "device/cuda_query.h"

namespace moerun {

DeviceChoice choose_device(const std::string& requested) {
  if (requested == "cpu") return {"cpu", "asked for"};
  if (requested != "auto" && requested != "cuda") {
    throw InvalidArgument(message("device: expected auto, cpu or cuda, found '", requested, "'"));
  }
  const CudaInfo cuda = query_cuda();
  const std::string obstacle = cuda.available
                                   ? message("found ", cuda.devices.front().name,
                                             ", but this version computes on the CPU only")
                                   : "no CUDA: " + cuda.reason;
  if (requested == "cuda") {
    throw InvalidArgument(
        message("device: cuda was asked for, but cannot be had: ", obstacle, "; use cpu or auto"));
  }
  return {"cpu", obstacle};
}

}  // namespace moerun
