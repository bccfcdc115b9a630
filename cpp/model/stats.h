// What a model can tell about itself, as one JSON text for every language binding.
#pragma once

#include <string>

#include "model/model.h"

namespace moerun {

// Keys carry their units; a figure that has not been measured yet is null.
std::string stats_json(const Model& model);
// The parsed config.json, in the field names of Hugging Face.
std::string config_json(const ModelConfig& config);
// Version, kernel sets, CUDA.
std::string build_info_json();

}  // namespace moerun
