#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "device/cpu/bandwidth.h"
#include "device/cuda_bandwidth.h"
#include "device/cuda_query.h"
#include "io/checkpoint.h"
#include "io/checkpoint_fingerprint.h"
#include "model/device_choice.h"
#include "model/stats.h"
#if defined(MOERUN_CUDA_HOST)
#include "host/host_backend.h"
#endif

namespace moerun::python {
namespace {

CudaBandwidth measure(const std::string& device, std::size_t bytes) {
#if defined(MOERUN_CUDA_HOST)
  if (device == "cuda-host") return cuda_host::measure_bandwidth(bytes);
#endif
  if (device == "cuda") return measure_cuda_bandwidth(bytes);
  throw InvalidArgument(message("device: expected cuda, found '", device, "'"));
}

py::dict device_bandwidth(const std::string& device, std::size_t bytes) {
  CudaBandwidth measured;
  {
    const py::gil_scoped_release release;
    measured = measure(device, bytes);
  }
  py::dict result;
  result["read_gb_per_s"] = measured.read;
  result["copy_gb_per_s"] = measured.copy;
  result["from_host_gb_per_s"] = measured.from_host;
  return result;
}

}  // namespace

void register_info(py::module_& module) {
#if defined(MOERUN_CUDA_HOST)
  module.attr("DEVICES") = py::make_tuple("auto", "cpu", "cuda", "cuda-host");
#else
  module.attr("DEVICES") = py::make_tuple("auto", "cpu", "cuda");
#endif
  module.def(
      "choose_device",
      [](const std::string& requested) {
        return requested == "cuda-host" ? requested : choose_device(requested, query_cuda()).device;
      },
      py::arg("requested"));
  module.def("build_info", [] { return from_json(build_info_json()); });
  module.def(
      "model_config",
      [](const std::string& path) { return from_json(config_json(load_model_config(path))); },
      py::arg("path"));
  module.def(
      "checkpoint_fingerprint",
      [](const std::string& path) {
        CheckpointFingerprint found;
        std::vector<std::string> files;
        {
          const py::gil_scoped_release release;
          const Checkpoint checkpoint = Checkpoint::open(path);
          found = fingerprint_of(checkpoint);
          for (const SafetensorsFile& file : checkpoint.files()) {
            files.push_back(file.path().native());
          }
        }
        py::list names;
        for (const std::string& file : files) names.append(py::bytes(file));
        return py::make_tuple(found.headers, found.contents, names);
      },
      py::arg("path"));
  module.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("threads"),
             py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
  module.def("device_bandwidth", &device_bandwidth, py::arg("device"), py::arg("bytes"));
}

}  // namespace moerun::python
