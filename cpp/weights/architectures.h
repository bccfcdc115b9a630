// One table of the supported families, and what differs between them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "weights/model_config.h"

namespace moerun {

// Which field of the config switches the biases of attention on.
enum class BiasField {
  none,            // the family has no biases
  attention_bias,  // of q, k, v and o
  qkv_bias         // of q, k and v
};

// Which layers attend to a sliding window.
enum class SlidingWindow {
  none,
  all_layers,          // wherever `sliding_window` is given
  all_if_switched_on,  // if `use_sliding_window`
  layer_types          // the layers that `layer_types` names; else every second one of the first
                       // `max_window_layers`, if `use_sliding_window`
};

// Whether chosen expert weights are renormalised to a sum of one.
enum class TopKNorm { from_config, always, not_applicable };

// The numbers are what Hugging Face's config class takes for a field that config.json leaves out.
struct Architecture {
  std::string_view model_type;

  std::int64_t vocab_size;
  std::int64_t hidden_size;
  std::int64_t num_hidden_layers;
  std::int64_t num_attention_heads;
  std::int64_t num_key_value_heads;  // 0: as many as attention heads
  std::int64_t max_position_embeddings;
  double rms_norm_eps;
  double rope_theta;
  std::optional<std::int64_t> eos_token_id;

  std::string_view num_experts_field;  // the other of its two names is understood too
  std::int64_t num_experts;
  std::int64_t top_k;
  std::int64_t intermediate_size;
  std::optional<std::int64_t> moe_intermediate_size;  // none: experts have `intermediate_size`
  std::optional<std::int64_t> shared_expert_intermediate_size;
  bool has_dense_layers = false;  // by `decoder_sparse_step` and `mlp_only_layers`

  NormKind norm = NormKind::rms;
  QkNorm qk_norm = QkNorm::none;
  BiasField bias = BiasField::none;
  bool bias_default = false;
  RouterKind router = RouterKind::softmax_top_k;
  TopKNorm top_k_norm = TopKNorm::from_config;
  SlidingWindow sliding_window = SlidingWindow::none;
  std::int64_t window_default = 0;  // 0: none
  bool has_multipliers = false;     // of Granite
};

std::span<const Architecture> architectures();

const Architecture* find_architecture(std::string_view model_type);  // null: not supported

}  // namespace moerun
