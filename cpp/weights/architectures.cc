#include "weights/architectures.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

namespace moerun {
namespace {

constexpr std::array<Architecture, 6> kArchitectures = {{
    {.model_type = "olmoe",
     .vocab_size = 50304,
     .hidden_size = 2048,
     .num_hidden_layers = 16,
     .num_attention_heads = 16,
     .num_key_value_heads = 0,
     .max_position_embeddings = 4096,
     .rms_norm_eps = 1e-5,
     .rope_theta = 1e4,
     .eos_token_id = 50279,
     .num_experts_field = "num_experts",
     .num_experts = 64,
     .top_k = 8,
     .intermediate_size = 2048,
     .moe_intermediate_size = std::nullopt,
     .shared_expert_intermediate_size = std::nullopt,
     .qk_norm = QkNorm::full,
     .bias = BiasField::attention_bias},
    {.model_type = "mixtral",
     .vocab_size = 32000,
     .hidden_size = 4096,
     .num_hidden_layers = 32,
     .num_attention_heads = 32,
     .num_key_value_heads = 8,
     .max_position_embeddings = 131072,
     .rms_norm_eps = 1e-5,
     .rope_theta = 1e6,
     .eos_token_id = 2,
     .num_experts_field = "num_local_experts",
     .num_experts = 8,
     .top_k = 2,
     .intermediate_size = 14336,
     .moe_intermediate_size = std::nullopt,
     .shared_expert_intermediate_size = std::nullopt,
     .top_k_norm = TopKNorm::always,
     .sliding_window = SlidingWindow::all_layers},
    {.model_type = "qwen2_moe",
     .vocab_size = 151936,
     .hidden_size = 2048,
     .num_hidden_layers = 24,
     .num_attention_heads = 16,
     .num_key_value_heads = 16,
     .max_position_embeddings = 32768,
     .rms_norm_eps = 1e-6,
     .rope_theta = 1e4,
     .eos_token_id = std::nullopt,
     .num_experts_field = "num_experts",
     .num_experts = 60,
     .top_k = 4,
     .intermediate_size = 5632,
     .moe_intermediate_size = 1408,
     .shared_expert_intermediate_size = 5632,
     .has_dense_layers = true,
     .bias = BiasField::qkv_bias,
     .bias_default = true,
     .sliding_window = SlidingWindow::layer_types,
     .window_default = 4096},
    {.model_type = "qwen3_moe",
     .vocab_size = 151936,
     .hidden_size = 2048,
     .num_hidden_layers = 24,
     .num_attention_heads = 32,
     .num_key_value_heads = 4,
     .max_position_embeddings = 32768,
     .rms_norm_eps = 1e-6,
     .rope_theta = 1e4,
     .eos_token_id = std::nullopt,
     .num_experts_field = "num_experts",
     .num_experts = 128,
     .top_k = 8,
     .intermediate_size = 6144,
     .moe_intermediate_size = 768,
     .shared_expert_intermediate_size = std::nullopt,
     .has_dense_layers = true,
     .qk_norm = QkNorm::per_head,
     .bias = BiasField::attention_bias,
     .sliding_window = SlidingWindow::all_if_switched_on,
     .window_default = 4096},
    {.model_type = "granitemoe",
     .vocab_size = 32000,
     .hidden_size = 4096,
     .num_hidden_layers = 32,
     .num_attention_heads = 32,
     .num_key_value_heads = 0,
     .max_position_embeddings = 2048,
     .rms_norm_eps = 1e-6,
     .rope_theta = 1e4,
     .eos_token_id = 2,
     .num_experts_field = "num_local_experts",
     .num_experts = 8,
     .top_k = 2,
     .intermediate_size = 11008,
     .moe_intermediate_size = std::nullopt,
     .shared_expert_intermediate_size = std::nullopt,
     .bias = BiasField::attention_bias,
     .router = RouterKind::top_k_softmax,
     .top_k_norm = TopKNorm::not_applicable,
     .has_multipliers = true},
    {.model_type = "phimoe",
     .vocab_size = 32064,
     .hidden_size = 4096,
     .num_hidden_layers = 32,
     .num_attention_heads = 32,
     .num_key_value_heads = 8,
     .max_position_embeddings = 131072,
     .rms_norm_eps = 1e-5,
     .rope_theta = 1e6,
     .eos_token_id = 2,
     .num_experts_field = "num_local_experts",
     .num_experts = 16,
     .top_k = 2,
     .intermediate_size = 6400,
     .moe_intermediate_size = std::nullopt,
     .shared_expert_intermediate_size = std::nullopt,
     .norm = NormKind::layer,
     .bias = BiasField::attention_bias,
     .router = RouterKind::sparse_mixer,
     .top_k_norm = TopKNorm::not_applicable,
     .sliding_window = SlidingWindow::all_layers},
}};

}  // namespace

std::span<const Architecture> architectures() { return kArchitectures; }

const Architecture* find_architecture(std::string_view model_type) {
  const auto* found =
      std::find_if(kArchitectures.begin(), kArchitectures.end(),
                   [&](const Architecture& a) { return a.model_type == model_type; });
  return found != kArchitectures.end() ? found : nullptr;
}

std::vector<std::string> supported_model_types() {
  std::vector<std::string> names;
  for (const Architecture& architecture : kArchitectures) {
    names.emplace_back(architecture.model_type);
  }
  return names;
}

}  // namespace moerun
