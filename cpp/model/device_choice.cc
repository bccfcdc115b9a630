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
  if (requested == "cuda") {
    if (cuda.available) return {"cuda", "asked for"};
    throw InvalidArgument(message("device: cuda was asked for, but cannot be had: no CUDA: ",
                                  cuda.reason, "; use cpu or auto"));
  }
  // Until somebody has measured the CUDA backend on a card, it runs only where it is asked for.
  if (cuda.available) {
    return {"cpu", message("found ", cuda.devices.front().name,
                           ", but CUDA is untried on real cards and must be asked for by name")};
  }
  return {"cpu", "no CUDA: " + cuda.reason};
}

}  // namespace moerun
