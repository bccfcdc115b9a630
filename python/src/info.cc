#include <filesystem>

#include "bindings.h"
#include "device/cpu/bandwidth.h"
#include "model/stats.h"

namespace moerun::python {

void register_info(py::module_& module) {
  module.def("build_info", [] { return from_json(build_info_json()); });
  module.def(
      "model_config",
      [](const std::string& path) { return from_json(config_json(load_model_config(path))); },
      py::arg("path"));
  module.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("threads"),
             py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace moerun::python
