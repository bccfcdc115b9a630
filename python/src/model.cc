#include "model/model.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "base/error.h"
#include "bindings.h"
#include "model/forward.h"
#include "model/generation.h"
#include "model/stats.h"
#include "python_model.h"

namespace moerun::python {
namespace {

std::unique_ptr<PythonModel> load(const std::string& path, const std::string& device,
                                  std::optional<int> threads,
                                  std::optional<std::int64_t> context_length,
                                  std::int64_t prefill_chunk, const std::string& cpu_kernels,
                                  const std::optional<py::function>& progress) {
  ModelOptions options;
  options.device = device;
  if (threads && *threads < 1) {
    throw InvalidArgument(message("threads: expected at least 1, found ", *threads));
  }
  if (context_length && *context_length < 1) {
    throw InvalidArgument(message("context_length: expected at least 1, found ", *context_length));
  }
  options.threads = threads.value_or(0);
  options.context_length = context_length.value_or(0);
  options.prefill_chunk = prefill_chunk;
  options.cpu_kernels = cpu_kernels;
  const LoadProgress report = [&](std::uint64_t done, std::uint64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) (*progress)(done, total);
  };
  const py::gil_scoped_release release;
  return std::make_unique<PythonModel>(Model::load(path, options, report));
}

py::array_t<float> forward_array(const PythonModel& self, const py::object& token_ids) {
  const auto model = self.get();
  const auto ids = token_ids_from(token_ids);
  model->check_prompt(ids);
  const auto vocab = static_cast<py::ssize_t>(model->config().vocab_size);
  py::array_t<float> logits({static_cast<py::ssize_t>(ids.size()), vocab});
  const std::span<float> target(logits.mutable_data(), static_cast<std::size_t>(logits.size()));
  {
    const py::gil_scoped_release release;
    forward(model, ids, target, signal_checker());
  }
  return logits;
}

std::unique_ptr<Generation> generate(const PythonModel& self, const py::object& token_ids,
                                     std::int64_t max_new_tokens, double temperature,
                                     std::int64_t top_k, double top_p, double min_p,
                                     double repetition_penalty, std::uint64_t seed,
                                     const std::vector<std::int32_t>& stop_token_ids) {
  const auto model = self.get();
  if (max_new_tokens < 0) {
    throw InvalidArgument(message("max_new_tokens: expected 0 or more, found ", max_new_tokens));
  }
  GenerationParams params;
  params.max_new_tokens = static_cast<std::size_t>(max_new_tokens);
  params.sampling = {temperature, top_k, top_p, min_p, repetition_penalty, seed};
  params.stop_token_ids = stop_token_ids;
  auto ids = token_ids_from(token_ids);
  const py::gil_scoped_release release;
  return std::make_unique<Generation>(model, std::move(ids), params);
}

}  // namespace

void register_model(py::module_& module) {
  py::class_<PythonModel>(module, "Model")
      .def(py::init(&load), py::arg("path"), py::kw_only(), py::arg("device") = "auto",
           py::arg("threads") = py::none(), py::arg("context_length") = py::none(),
           py::arg("prefill_chunk") = 512, py::arg("cpu_kernels") = "auto",
           py::arg("progress") = py::none())
      .def("forward", &forward_array, py::arg("token_ids"))
      .def("generate", &generate, py::arg("token_ids"), py::kw_only(), py::arg("max_new_tokens"),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("repetition_penalty"), py::arg("seed"), py::arg("stop_token_ids"))
      .def("stats", [](const PythonModel& self) { return from_json(stats_json(*self.get())); })
      .def("close", &PythonModel::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly(
          "config",
          [](const PythonModel& self) { return from_json(config_json(self.get()->config())); })
      .def_property_readonly("context_length",
                             [](const PythonModel& self) { return self.get()->context_length(); })
      .def_property_readonly("device",
                             [](const PythonModel& self) { return self.get()->device(); });
}

}  // namespace moerun::python
