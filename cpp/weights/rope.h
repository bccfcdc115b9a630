// Frequencies of rotary position embedding.
#pragma once

#include <cstdint>
#include <vector>

#include "weights/model_config.h"

namespace moerun {

// The angle of pair i at position p is p * inv_freq[i]; cos and sin are multiplied by `scale`.
// A sequence of more than `long_above` tokens uses the long set throughout, where there is one.
struct RopeTable {
  std::vector<float> inv_freq;       // (head_dim / 2)
  std::vector<float> inv_freq_long;  // (head_dim / 2) of longrope, else empty
  float scale = 1.0f;
  float scale_long = 1.0f;
  std::int64_t long_above = 0;
};

// In float32, operation by operation as Hugging Face does it, since a difference of one unit in the
// last place becomes a visible angle at position 100,000.
RopeTable make_rope_table(const ModelConfig& config);

}  // namespace moerun
