#include "model/generation.h"

#include <pybind11/stl.h>

#include "base/error.h"
#include "bindings.h"

namespace moerun::python {

GenerationParams generation_params_from(const py::kwargs& kwargs) {
  GenerationParams params;
  SamplingParams& sampling = params.sampling;
  for (const auto& [key, value] : kwargs) {
    const auto name = key.cast<std::string>();
    if (name == "max_new_tokens") {
      const auto count = value.cast<std::int64_t>();
      if (count < 0) {
        throw InvalidArgument(message("max_new_tokens: expected 0 or more, found ", count));
      }
      params.max_new_tokens = static_cast<std::size_t>(count);
    } else if (name == "stop_token_ids") {
      params.stop_token_ids = value.cast<std::vector<std::int32_t>>();
    } else if (name == "temperature") {
      sampling.temperature = value.cast<double>();
    } else if (name == "top_k") {
      sampling.top_k = value.cast<std::int64_t>();
    } else if (name == "top_p") {
      sampling.top_p = value.cast<double>();
    } else if (name == "min_p") {
      sampling.min_p = value.cast<double>();
    } else if (name == "repetition_penalty") {
      sampling.repetition_penalty = value.cast<double>();
    } else if (name == "seed") {
      sampling.seed = value.cast<std::uint64_t>();
    } else {
      throw py::type_error(message("unexpected keyword argument '", name, "'"));
    }
  }
  return params;
}

void register_generation(py::module_& module) {
  py::class_<Generation, OwnedGeneration>(module, "Generation")
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
