// What calibration measures with: times of layers, and of transfers.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "base/cpu_features.h"
#include "bindings.h"
#include "python_model.h"

namespace moerun::python {
namespace {

py::array_t<double> table_of(const std::vector<PassTimes>& passes, std::size_t num_layers,
                             std::vector<double> PassTimes::* times) {
  py::array_t<double> table(
      {static_cast<py::ssize_t>(passes.size()), static_cast<py::ssize_t>(num_layers)});
  double* row = table.mutable_data();
  for (const PassTimes& pass : passes) {
    row = std::copy((pass.*times).begin(), (pass.*times).end(), row);
  }
  return table;
}

py::dict layer_times(const PythonModel& self) {
  const auto model = self.get();
  const LayerTimes& times = model->layer_times();
  const auto tokens = times.tokens();
  const auto prompts = times.prompts();
  const std::size_t layers = times.num_layers();
  py::array_t<double> token_s(static_cast<py::ssize_t>(tokens.size()));
  for (std::size_t i = 0; i < tokens.size(); ++i) token_s.mutable_data()[i] = tokens[i].token_s;
  py::array_t<std::int64_t> prompt_tokens(static_cast<py::ssize_t>(prompts.size()));
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    prompt_tokens.mutable_data()[i] = static_cast<std::int64_t>(prompts[i].num_tokens);
  }
  py::dict result;
  result["attention_s"] = table_of(tokens, layers, &PassTimes::attention_s);
  result["moe_s"] = table_of(tokens, layers, &PassTimes::moe_s);
  result["waited_s"] = table_of(tokens, layers, &PassTimes::waited_s);
  result["token_s"] = token_s;
  result["prompt_attention_s"] = table_of(prompts, layers, &PassTimes::attention_s);
  result["prompt_moe_s"] = table_of(prompts, layers, &PassTimes::moe_s);
  result["prompt_tokens"] = prompt_tokens;
  return result;
}

std::tuple<std::size_t, std::uint64_t, double> measure_transfers(
    const PythonModel& self, std::size_t layer, const std::vector<std::size_t>& experts,
    std::size_t first_record) {
  const auto model = self.get();
  const py::gil_scoped_release release;
  const TransferTiming timing =
      model->measure_transfers(layer, experts, first_record, signal_checker());
  return {timing.num_pieces, timing.bytes, timing.seconds};
}

}  // namespace

void register_timing(py::module_& module) {
  module.def("layer_times", &layer_times, py::arg("model"));
  module.def("measure_transfers", &measure_transfers, py::arg("model"), py::arg("layer"),
             py::arg("experts"), py::arg("first_record"));
  module.def("num_usable_cpus", &num_usable_cpus);
}

}  // namespace moerun::python
