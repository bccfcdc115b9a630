// A model as Python holds it: it can be closed before it is collected.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
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

// A model while a call uses it.
class OpenModel {
 public:
  // ForkError: see Model::Use.
  explicit OpenModel(std::shared_ptr<Model> model) : model_(std::move(model)), use_(*model_) {}

  Model* operator->() const { return model_.get(); }
  Model& operator*() const { return *model_; }
  operator const std::shared_ptr<Model>&() const { return model_; }

 private:
  std::shared_ptr<Model> model_;
  Model::Use use_;
};

class PythonModel {
 public:
  explicit PythonModel(std::shared_ptr<Model> model) : model_(std::move(model)) {}

  // Throws InvalidArgument once closed, ForkError. Generations that are under way keep the model
  // alive. Call with the GIL, as below: then a fork from Python never finds the mutex locked.
  OpenModel get() const {
    const std::lock_guard lock(mutex_);
    if (!model_) throw InvalidArgument("the model is closed: load it again");
    return OpenModel(model_);
  }
  // The model from now on is closed; null if it was.
  std::shared_ptr<Model> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(model_, nullptr);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Model> model_;
};

}  // namespace moerun::python
