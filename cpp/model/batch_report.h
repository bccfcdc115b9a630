// What a batch has come to, as JSON. For .cc files only.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "model/batch_stats.h"

namespace moerun {

// The value of "batch" in a model's statistics.
nlohmann::ordered_json batch_json(const BatchStats& batch);

}  // namespace moerun
