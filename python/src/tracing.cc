// Routing of sequences as a model runs them.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "base/error.h"
#include "bindings.h"
#include "model/trace_routing.h"
#include "python_model.h"

namespace moerun::python {
namespace {

template <typename Number>
py::object array_of(const std::vector<Number>& numbers, const std::vector<std::size_t>& shape) {
  if (numbers.empty()) return py::none();
  std::vector<py::ssize_t> axes;
  for (const std::size_t size : shape) axes.push_back(static_cast<py::ssize_t>(size));
  return py::array_t<Number>(axes, numbers.data());
}

py::dict trace(const PythonModel& self, const py::object& token_ids, std::size_t generate,
               double temperature, std::uint64_t seed, bool with_weights, bool with_logits,
               bool with_predictions, bool with_prefetch) {
  const auto model = self.get();
  const auto ids = token_ids_from(token_ids);
  const RoutingRecordOptions options{with_weights, with_logits, with_predictions, with_prefetch};
  RoutingRecord record;
  {
    const py::gil_scoped_release release;
    if (generate == 0) {
      record = trace_routing(model, ids, options, signal_checker());
    } else {
      SamplingParams sampling;
      sampling.temperature = temperature;
      sampling.seed = seed;
      record = trace_decoding(model, ids, generate, sampling, options, signal_checker());
    }
  }
  const std::size_t layers = record.num_layers;
  const std::size_t tokens = record.num_tokens;
  py::dict result;
  result["token_ids"] = array_of(record.token_ids, {tokens});
  result["expert_ids"] = array_of(record.expert_ids, {layers, tokens, record.top_k});
  result["expert_weights"] = array_of(record.expert_weights, {layers, tokens, record.top_k});
  result["router_logits"] = array_of(record.router_logits, {layers, tokens, record.num_experts});
  result["predicted_ids"] = array_of(record.predicted_ids, {tokens});
  result["prefetch_ids"] = array_of(record.prefetch_ids, {layers, tokens, record.top_k});
  return result;
}

std::vector<std::size_t> moe_layers(const PythonModel& self) {
  std::vector<std::size_t> layers;
  const auto model = self.get();
  const auto& all = model->weights().layers;
  for (std::size_t index = 0; index < all.size(); ++index) {
    if (all[index].experts.num_experts != 0) layers.push_back(index);
  }
  return layers;
}

}  // namespace

void register_tracing(py::module_& module) {
  module.def("trace", &trace, py::arg("model"), py::arg("token_ids"), py::arg("generate"),
             py::arg("temperature"), py::arg("seed"), py::arg("with_weights"),
             py::arg("with_logits"), py::arg("with_predictions"), py::arg("with_prefetch"));
  module.def("moe_layers", &moe_layers, py::arg("model"));
}

}  // namespace moerun::python
