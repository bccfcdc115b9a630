#include "model/generation.h"

#include "bindings.h"

namespace moerun::python {

void register_generation(py::module_& module) {
  py::class_<Generation>(module, "Generation")
      .def("__iter__", [](const py::object& self) { return self; })
      .def("__next__",
           [](Generation& self) {
             std::optional<std::int32_t> token;
             {
               const py::gil_scoped_release release;
               token = self.next(signal_checker());
             }
             if (!token) throw py::stop_iteration();
             return *token;
           })
      .def_property_readonly("prompt_tokens",
                             [](const Generation& self) { return self.stats().prompt_tokens; });
}

}  // namespace moerun::python
