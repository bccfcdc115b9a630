// A model as Python holds it: it can be closed before it is collected.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "model/model.h"
#include "predict/predictor_file.h"

namespace moerun::python {

// Options of a model by keyword, as Python passes them; what is not there keeps its default.
ModelOptions options_from(const pybind11::kwargs& kwargs);

// What a predictor for this model says that it is of.
ExpectedModel expected_model(const ModelConfig& config, const ModelWeights& weights,
                             std::string model_id, std::string tokenizer_hash);

// (token, layer, expert, name of the kind) each.
pybind11::list as_list(const std::vector<CacheEvent>& events);

class PythonModel {
 public:
  explicit PythonModel(std::shared_ptr<Model> model) : model_(std::move(model)) {}

  // Throws InvalidArgument once closed. Generations that are under way keep the model alive.
  std::shared_ptr<Model> get() const {
    const std::lock_guard lock(mutex_);
    if (!model_) throw InvalidArgument("the model is closed: load it again");
    return model_;
  }
  void close() {
    std::shared_ptr<Model> last;  // freed after the lock
    const std::lock_guard lock(mutex_);
    last.swap(model_);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Model> model_;
};

}  // namespace moerun::python
