#include "model/device_choice.h"

#include "base/error.h"
#include "device/cuda_backend.h"
#include "device/cuda_usable.h"

namespace moerun {

DeviceChoice choose_device(const std::string& requested, const CudaInfo& cuda) {
  if (requested == "cpu") return {"cpu", "asked for"};
  if (requested != "auto" && requested != "cuda") {
    throw InvalidArgument(message("device: expected auto, cpu or cuda, found '", requested, "'"));
  }
  if (cuda.available) {
    const auto index = static_cast<std::size_t>(cuda.usable_device);
    return {"cuda",
            (requested == "cuda" ? "asked for: " : "found ") + device_text(cuda.devices.at(index))};
  }
  if (requested == "cuda") {
    throw InvalidArgument(message("device cuda: ", cuda.reason, "; use cpu or auto"));
  }
  return {"cpu", "no CUDA: " + cuda.reason};
}

std::unique_ptr<Backend> make_backend(const DeviceChoice& choice, int threads,
                                      const std::string& cpu_kernels) {
  if (choice.device == "cpu") return make_cpu_backend(threads, cpu_kernels);
  const auto text = [&](const Error& error) {
    return message("device cuda (", choice.reason, "): ", error.what(),
                   "; device cpu does without it");
  };
  try {
    return make_cuda_backend();
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(text(error));
  } catch (const DeviceError& error) {
    throw DeviceError(text(error), error.needs_restart());
  }
}

}  // namespace moerun
