// What config.json says of a model, checked and in one form for every family and every age of file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "device/op_params.h"

namespace moerun {

// Where query and key are normalised before RoPE.
enum class QkNorm {
  none,
  full,     // one norm over all heads together (OLMoE)
  per_head  // one norm a head, shared weights (Qwen3)
};

enum class RopeKind { standard, linear, llama3, yarn, longrope };

// Rotary position embedding. Fields beyond `theta` matter only to the kinds that name them.
struct RopeConfig {
  RopeKind kind = RopeKind::standard;
  double theta = 10000.0;
  double factor = 1.0;                                // linear, llama3, yarn, longrope
  std::optional<double> attention_factor;             // yarn, longrope: scale of cos and sin
  double beta_fast = 32.0;                            // yarn
  double beta_slow = 1.0;                             // yarn
  std::optional<double> mscale;                       // yarn
  std::optional<double> mscale_all_dim;               // yarn
  bool truncate = true;                               // yarn: whole-number correction range
  double low_freq_factor = 1.0;                       // llama3
  double high_freq_factor = 4.0;                      // llama3
  std::int64_t original_max_position_embeddings = 0;  // llama3, yarn, longrope
  std::vector<double> short_factor;                   // longrope, (head_dim / 2)
  std::vector<double> long_factor;                    // longrope, (head_dim / 2)
  std::optional<double> short_mscale;                 // longrope of Phi-MoE
  std::optional<double> long_mscale;                  // longrope of Phi-MoE
};

struct ModelConfig {
  std::string model_type;  // "olmoe", "mixtral", ...

  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_hidden_layers = 0;
  std::int64_t num_attention_heads = 0;
  std::int64_t num_key_value_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_position_embeddings = 0;

  std::int64_t num_experts = 0;
  std::int64_t top_k = 0;
  std::int64_t moe_intermediate_size = 0;
  std::int64_t dense_intermediate_size = 0;          // of layers without experts
  std::int64_t shared_expert_intermediate_size = 0;  // 0: no shared expert
  std::vector<std::uint8_t> is_moe_layer;            // (num_hidden_layers) 1: has experts

  NormKind norm = NormKind::rms;
  double norm_eps = 1e-5;
  QkNorm qk_norm = QkNorm::none;
  std::optional<double> clip_qkv;  // clamp of q, k and v to +-clip_qkv
  bool qkv_bias = false;
  bool o_bias = false;
  bool lm_head_bias = false;
  bool tie_word_embeddings = false;

  RouterKind router = RouterKind::softmax_top_k;
  bool norm_topk_prob = false;
  double router_jitter_noise = 0.0;  // sparse_mixer: half-width of its threshold

  double embedding_multiplier = 1.0;
  double attention_multiplier = 0.0;  // scale of q.k; set to 1/sqrt(head_dim) where not given
  double residual_multiplier = 1.0;
  double logits_divisor = 1.0;  // logits_scaling of Granite

  RopeConfig rope;
  std::vector<std::int64_t> sliding_window;  // (num_hidden_layers) 0: full attention

  std::vector<std::int64_t> eos_token_ids;
  std::string dtype;  // what the config says the weights are; the tensors decide

  // Empty if this version computes what the config describes; else why not (a custom field).
  std::string not_runnable;

  std::int64_t num_moe_layers() const;
  // Bytes of one routed expert as stored in memory, for weights of `element_bytes` each.
  std::size_t expert_bytes(std::size_t element_bytes) const;
};

// The model types that `parse_model_config` accepts, in the order of the architecture table.
std::vector<std::string> supported_model_types();

// Parses the text of a config.json. `where` names the file in messages. Throws FormatError for a
// malformed or contradictory config, UnsupportedModel for a family that is not in the table.
ModelConfig parse_model_config(std::string_view json_text, const std::string& where);

// Reads `directory`/config.json, then the eos ids of generation_config.json where there is one.
ModelConfig load_model_config(const std::filesystem::path& directory);

}  // namespace moerun
