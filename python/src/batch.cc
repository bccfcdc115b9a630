#include "model/batch_generation.h"

#include <pybind11/stl.h>

#include "base/error.h"
#include "bindings.h"
#include "python_model.h"

namespace moerun::python {
namespace {

std::unique_ptr<BatchGeneration> make_batch(const PythonModel& model, std::size_t batch_size,
                                            const std::string& kv_budget,
                                            const std::string& schedule,
                                            const std::string& predictor, std::string model_id,
                                            std::string tokenizer_hash) {
  const auto held = model.get();
  BatchOptions options;
  options.batch_size = batch_size;
  options.kv_budget = kv_budget;
  options.schedule = schedule_mode_from(schedule);
  options.predictor = predictor;
  options.expected.model_id = std::move(model_id);
  options.expected.tokenizer_hash = std::move(tokenizer_hash);
  options.expected.vocab_size = static_cast<std::size_t>(held->config().vocab_size);
  options.expected.num_experts = static_cast<std::size_t>(held->config().num_experts);
  const auto& layers = held->weights().layers;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (layers[layer].experts.num_experts != 0) options.expected.moe_layers.push_back(layer);
  }
  options.expected.top_k = static_cast<std::size_t>(held->config().top_k);
  const py::gil_scoped_release release;
  return std::make_unique<BatchGeneration>(held, options);
}

py::list step(BatchGeneration& self) {
  std::vector<BatchToken> tokens;
  {
    const py::gil_scoped_release release;
    tokens = self.step(signal_checker());
  }
  py::list list;
  for (const BatchToken& token : tokens) {
    list.append(py::make_tuple(token.sequence, token.token_id, token.is_last));
  }
  return list;
}

}  // namespace

void register_batch(py::module_& module) {
  py::class_<BatchGeneration>(module, "BatchGeneration")
      .def(py::init(&make_batch), py::arg("model"), py::arg("batch_size"), py::arg("kv_budget"),
           py::arg("schedule"), py::arg("predictor"), py::arg("model_id"),
           py::arg("tokenizer_hash"))
      .def(
          "add",
          [](BatchGeneration& self, const py::object& token_ids, const py::kwargs& params) {
            auto ids = token_ids_from(token_ids);
            const GenerationParams wanted = generation_params_from(params);
            const py::gil_scoped_release release;
            return self.add(std::move(ids), wanted);
          },
          py::arg("token_ids"))
      .def("step", &step)
      .def("cancel", &BatchGeneration::cancel, py::arg("sequence"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace moerun::python
