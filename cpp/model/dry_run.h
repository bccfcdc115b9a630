// What a model would hold in each tier of memory, found out without loading it.
#pragma once

#include <filesystem>
#include <string>

#include "model/model.h"

namespace moerun {

// One JSON object. Reads config.json and the headers of the weights only; throws what Model::load
// throws for the same options.
std::string dry_run_json(const std::filesystem::path& path, const ModelOptions& options);

}  // namespace moerun
