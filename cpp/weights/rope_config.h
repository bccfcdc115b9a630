// The rotary part of config.json, in all the forms that it has had. For .cc files only.
#pragma once

#include "weights/architectures.h"
#include "weights/config_reader.h"
#include "weights/model_config.h"

namespace moerun {

// Needs `model.head_dim` and `model.max_position_embeddings`.
RopeConfig read_rope_config(const ConfigReader& reader, const Architecture& architecture,
                            const ModelConfig& model);

}  // namespace moerun
