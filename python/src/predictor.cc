// The routing-path predictor; moerun/predictor is the documented face of it.
#include "predict/path_predictor.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "trace_arrays.h"

namespace moerun::python {
namespace {

// Owns the device that computes, and lets one call at a time use it.
struct NativePredictor {
  bool is_lost() const noexcept { return origin.is_lost(); }

  Origin origin;
  std::unique_ptr<Backend> cpu;
  std::unique_ptr<PathPredictor> predictor;
  std::mutex mutex;
};

// Of one call, which is then the only one. ForkError: see Origin.
class Turn {
 public:
  explicit Turn(NativePredictor& predictor) {
    predictor.origin.check_usable("the predictor");
    lock_ = std::unique_lock(predictor.mutex);
  }

 private:
  InUse in_use_;
  std::unique_lock<std::mutex> lock_;
};

// Keeps its predictor alive.
struct NativeState {
  bool is_lost() const noexcept { return owner->is_lost(); }

  std::shared_ptr<NativePredictor> owner;
  PathPredictor::State state;
};

using OwnedState = std::unique_ptr<NativeState, DeleteUnlessLost>;

// Between two of them a long prompt may be interrupted.
constexpr std::size_t kTokensAtOnce = 1200;

std::shared_ptr<NativePredictor> open(const std::string& path, int threads,
                                      const std::string& cpu_kernels, std::string model_id,
                                      std::string tokenizer_hash, std::size_t vocab_size,
                                      std::size_t num_experts, std::size_t top_k) {
  ExpectedModel expected;
  expected.model_id = std::move(model_id);
  expected.tokenizer_hash = std::move(tokenizer_hash);
  expected.vocab_size = vocab_size;
  expected.num_experts = num_experts;
  expected.top_k = top_k;
  const py::gil_scoped_release release;
  std::shared_ptr<NativePredictor> opened(new NativePredictor, DeleteUnlessLost{});
  opened->cpu = make_cpu_backend(checked_threads(threads), cpu_kernels);
  opened->predictor = PathPredictor::open(path, expected, *opened->cpu);
  return opened;
}

py::array_t<float> empty_array(std::size_t rows, const PredictorShape& shape) {
  return py::array_t<float>({rows, shape.moe_layers.size(), shape.num_experts});
}

py::array_t<float> predict(NativePredictor& self, const py::object& token_ids) {
  const auto ids = token_ids_from(token_ids);
  const std::size_t outputs = self.predictor->shape().num_outputs();
  py::array_t<float> result = empty_array(ids.size(), self.predictor->shape());
  const std::span<float> all(result.mutable_data(), ids.size() * outputs);
  const Checkpointer checkpoint = signal_checker();
  const py::gil_scoped_release release;
  const Turn turn(self);
  PathPredictor::State state = self.predictor->make_state();
  for (std::size_t first = 0; first < ids.size(); first += kTokensAtOnce) {
    const std::size_t count = std::min(kTokensAtOnce, ids.size() - first);
    self.predictor->predict_each(state, std::span(ids).subspan(first, count),
                                 all.subspan(first * outputs, count * outputs));
    checkpoint();
  }
  return result;
}

py::array_t<float> advance(NativePredictor& self, const std::vector<NativeState*>& states,
                           const std::vector<py::object>& new_tokens) {
  std::vector<std::vector<std::int32_t>> ids;
  for (const py::object& tokens : new_tokens) ids.push_back(token_ids_from(tokens));
  std::vector<PathPredictor::Input> inputs;
  for (std::size_t i = 0; i < std::min(states.size(), ids.size()); ++i) {
    inputs.push_back({&states[i]->state, ids[i]});
  }
  py::array_t<float> result = empty_array(inputs.size(), self.predictor->shape());
  const std::span<float> all(result.mutable_data(), static_cast<std::size_t>(result.size()));
  const py::gil_scoped_release release;
  const Turn turn(self);
  self.predictor->predict(inputs, all);
  return result;
}

}  // namespace

void register_predictor(py::module_& module) {
  py::class_<NativeState, OwnedState>(module, "PathState")
      .def_property_readonly("num_tokens",
                             [](const NativeState& self) { return self.state.num_tokens(); })
      .def_property_readonly("bytes", [](const NativeState& self) { return self.state.bytes(); })
      .def("clear", [](NativeState& self) {
        const py::gil_scoped_release release;  // which the call that holds the mutex may want
        const Turn turn(*self.owner);
        self.state.clear();
      });
  py::class_<NativePredictor, std::shared_ptr<NativePredictor>>(module, "PathPredictor")
      .def(py::init(&open), py::arg("path"), py::kw_only(), py::arg("threads"),
           py::arg("cpu_kernels") = "auto", py::arg("model_id") = "",
           py::arg("tokenizer_hash") = "", py::arg("vocab_size") = 0, py::arg("num_experts") = 0,
           py::arg("top_k") = 0)
      .def("make_state",
           [](const std::shared_ptr<NativePredictor>& self) {
             self->origin.check_usable("the predictor");
             return OwnedState(new NativeState{self, self->predictor->make_state()});
           })
      .def("predict", &predict)
      .def("advance", &advance)
      .def_property_readonly("memory_bytes", [](const NativePredictor& self) {
        return self.predictor->memory_bytes();
      });
}

}  // namespace moerun::python
