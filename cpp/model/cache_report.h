// What the expert cache does and holds, as JSON. For .cc files only.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "model/model.h"

namespace moerun {

// The value of "cache" in a model's statistics.
nlohmann::ordered_json cache_json(const Model& model);

// Of both, "host": where the host keeps the experts that a device copies; null: no device does.
nlohmann::ordered_json host_json(const HostPlan* plan);

}  // namespace moerun
