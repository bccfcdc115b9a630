#include "model/batch_generation.h"

#include <pybind11/stl.h>

#include "base/error.h"
#include "bindings.h"
#include "python_model.h"

namespace moerun::python {

ExpectedModel expected_model(const ModelConfig& config, const ModelWeights& weights,
                             std::string model_id, std::string tokenizer_hash) {
  ExpectedModel expected;
  expected.model_id = std::move(model_id);
  expected.tokenizer_hash = std::move(tokenizer_hash);
  expected.vocab_size = static_cast<std::size_t>(config.vocab_size);
  expected.num_experts = static_cast<std::size_t>(config.num_experts);
  expected.top_k = static_cast<std::size_t>(config.top_k);
  for (std::size_t layer = 0; layer < weights.layers.size(); ++layer) {
    if (weights.layers[layer].experts.num_experts != 0) expected.moe_layers.push_back(layer);
  }
  return expected;
}

namespace {

OwnedBatch make_batch(const PythonModel& model, std::size_t batch_size,
                      const std::string& kv_budget, const std::string& schedule,
                      const std::string& predictor, std::string model_id,
                      std::string tokenizer_hash) {
  const auto held = model.get();
  BatchOptions options;
  options.batch_size = batch_size;
  options.kv_budget = kv_budget;
  options.schedule = schedule_mode_from(schedule);
  options.predictor = predictor;
  options.expected = expected_model(held->config(), held->weights(), std::move(model_id),
                                    std::move(tokenizer_hash));
  const py::gil_scoped_release release;
  return OwnedBatch(new BatchGeneration(held, options));
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
  py::class_<BatchGeneration, OwnedBatch>(module, "BatchGeneration")
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
