#include "model/batch_generation.h"

#include <pybind11/stl.h>

#include "base/error.h"
#include "bindings.h"
#include "python_model.h"

namespace moerun::python {
namespace {

std::unique_ptr<BatchGeneration> make_batch(const PythonModel& model, std::size_t batch_size,
                                            const std::string& kv_budget) {
  const auto held = model.get();
  const py::gil_scoped_release release;
  return std::make_unique<BatchGeneration>(held, BatchOptions{batch_size, kv_budget});
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
      .def(py::init(&make_batch), py::arg("model"), py::arg("batch_size"), py::arg("kv_budget"))
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
