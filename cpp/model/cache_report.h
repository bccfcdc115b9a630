// What the expert cache does and holds, as JSON. For .cc files only.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "model/model.h"

namespace moerun {

// The value of "cache" in a model's statistics.
nlohmann::ordered_json cache_json(const Model& model);
// The same of a cache that has counted `stats`; `expert_bytes`: of all routed experts; `host`: null
// where no device copies experts from the host.
nlohmann::ordered_json cache_json(const CacheLayout& layout, const CacheStats& stats,
                                  const WindowHits& window, std::size_t expert_bytes,
                                  const HostPlan* host = nullptr);

// What Model::reconfigure did, and how long it took.
nlohmann::ordered_json reconfiguration_json(const Reconfiguration& changes, double seconds);

// Of both, "host": where the host keeps the experts that a device copies; null: no device does.
nlohmann::ordered_json host_json(const HostPlan* plan);

}  // namespace moerun
