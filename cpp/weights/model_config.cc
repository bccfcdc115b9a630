#include "weights/model_config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/view.h"
#include "io/json_text.h"
#include "io/quote.h"
#include "weights/architectures.h"
#include "weights/config_reader.h"
#include "weights/rope_config.h"

namespace moerun {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;
constexpr std::int64_t kMaxTokenId = (std::int64_t{1} << 31) - 1;

const Architecture& require_architecture(const ConfigReader& reader) {
  std::string supported;
  for (const Architecture& a : architectures()) {
    supported += (supported.empty() ? "" : ", ") + std::string(a.model_type);
  }
  if (!reader.has("model_type")) {
    throw UnsupportedModel(message(reader.field("model_type"),
                                   ": is missing, expected one of the supported ", supported));
  }
  const std::string name = reader.text("model_type", "");
  const Architecture* architecture = find_architecture(name);
  if (architecture == nullptr) {
    throw UnsupportedModel(message(reader.field("model_type"), ": found ", quote(name),
                                   ", which is not supported; supported are ", supported));
  }
  return *architecture;
}

void check_computable(const ConfigReader& reader) {
  for (const char* key : {"quantization_config", "quantization"}) {  // the second one is of MLX
    if (!reader.has(key)) continue;
    throw UnsupportedModel(message(reader.field(key),
                                   ": found, expected none: quantised weights are not supported; "
                                   "download a version in float32, float16 or bfloat16"));
  }
  // No supported family nests its sizes; where a file does, two places could disagree.
  if (reader.has("text_config")) {
    throw UnsupportedModel(message(reader.field("text_config"),
                                   ": found, expected all fields side by side: a config within a "
                                   "config, as models for pictures or sound have, is not "
                                   "supported; use the text model's own config.json"));
  }
  for (const char* key : {"hidden_act", "activation_function"}) {
    const std::string activation = reader.text(key, "silu");
    if (activation != "silu" && activation != "swish") {
      throw UnsupportedModel(
          message(reader.field(key), ": found ", quote(activation), ", supported is silu"));
    }
  }
}

// Hugging Face's models know these fields not at all; LLaMA-MoE v2 computes something else by them.
std::string custom_fields(const json& object) {
  static const std::pair<const char*, json> kNeutral[] = {
      {"scale_factor", 1},       {"intermediate_size_residual", nullptr},
      {"use_attn_moe", false},   {"num_moe_contract_layers", 0},
      {"attention_bias", false}, {"add_rescale_bias", false}};
  std::string names;
  for (const auto& [key, neutral] : kNeutral) {
    const auto found = object.find(key);
    if (found == object.end() || found->is_null() || *found == neutral) continue;
    names += (names.empty() ? "" : ", ") + std::string(key);
  }
  if (names.empty()) return "";
  return message("the config has fields of a custom model that Mixtral does not know (", names,
                 "), as LLaMA-MoE v2 has; this version does not compute what they mean");
}

void read_sizes(const ConfigReader& reader, const Architecture& a, ModelConfig& model) {
  model.vocab_size = reader.integer("vocab_size", a.vocab_size, 1, kMaxVocabSize);
  model.hidden_size = reader.integer("hidden_size", a.hidden_size, 1, kMaxHiddenSize);
  model.num_hidden_layers = reader.integer("num_hidden_layers", a.num_hidden_layers, 1, kMaxLayers);
  model.max_position_embeddings =
      reader.integer("max_position_embeddings", a.max_position_embeddings, 2, kMaxPositions);

  const std::int64_t heads =
      reader.integer("num_attention_heads", a.num_attention_heads, 1, kMaxHeads);
  model.num_attention_heads = heads;
  // Absent is the family's default, null is one for every attention head.
  const bool is_null =
      reader.is_present("num_key_value_heads") && !reader.has("num_key_value_heads");
  const std::int64_t kv_default =
      is_null || a.num_key_value_heads == 0 ? heads : a.num_key_value_heads;
  model.num_key_value_heads = reader.integer("num_key_value_heads", kv_default, 1, kMaxHeads);
  if (heads % model.num_key_value_heads != 0) {
    throw FormatError(message(reader.field("num_key_value_heads"), ": is ",
                              model.num_key_value_heads,
                              ", expected a divisor of num_attention_heads, ", heads,
                              "; correct the file or download it again"));
  }

  model.head_dim = reader.integer("head_dim", model.hidden_size / heads, 1, kMaxHeadDim);
  if (model.head_dim < 2 || model.head_dim > kMaxHeadDim || model.head_dim % 2 != 0) {
    throw FormatError(message(reader.field("head_dim"), ": is ", model.head_dim,
                              reader.has("head_dim") ? "" : " (hidden_size / num_attention_heads)",
                              ", expected an even number from 2 to ", kMaxHeadDim,
                              "; correct the file or download it again"));
  }
  if (heads * model.head_dim > kMaxHeadsTimesDim) {
    throw FormatError(message(reader.field("num_attention_heads"), ": ", heads, " heads of ",
                              model.head_dim, ", expected at most ", kMaxHeadsTimesDim,
                              " elements together; correct the file or download it again"));
  }
  // The one norm over all query heads has as many weights as the hidden state.
  if (a.qk_norm == QkNorm::full && heads * model.head_dim != model.hidden_size) {
    throw FormatError(message(reader.field("head_dim"), ": ", heads, " heads of ", model.head_dim,
                              ", expected them to make up hidden_size, ", model.hidden_size,
                              "; correct the file or download it again"));
  }
}

void read_experts(const ConfigReader& reader, const Architecture& a, ModelConfig& model) {
  const std::string primary(a.num_experts_field);
  const std::string other = primary == "num_experts" ? "num_local_experts" : "num_experts";
  const std::string& used = reader.has(primary) || !reader.has(other) ? primary : other;
  model.num_experts = reader.integer(used, a.num_experts, 1, kMaxExperts);
  if (reader.integer(other, model.num_experts, 0, kMaxExperts) != model.num_experts) {
    reader.fail(other, message("the same number as in ", quote(primary), ", ", model.num_experts));
  }

  const bool is_mixer = a.router == RouterKind::sparse_mixer;
  model.top_k = reader.integer("num_experts_per_tok", a.top_k, 1, kMaxExperts);
  if (is_mixer && model.top_k != 2)
    reader.fail("num_experts_per_tok",
                "2, the only number the "
                "family's router is defined for");
  if (model.top_k > model.num_experts) {
    throw FormatError(message(reader.field("num_experts_per_tok"), ": is ", model.top_k,
                              ", expected at most the number of experts, ", model.num_experts,
                              "; correct the file or download it again"));
  }

  const std::int64_t intermediate =
      reader.integer("intermediate_size", a.intermediate_size, 1, kMaxIntermediateSize);
  model.moe_intermediate_size = intermediate;
  if (a.moe_intermediate_size) {
    model.moe_intermediate_size =
        reader.integer("moe_intermediate_size", *a.moe_intermediate_size, 1, kMaxIntermediateSize);
  }
  if (a.has_dense_layers) model.dense_intermediate_size = intermediate;
  if (a.shared_expert_intermediate_size) {
    model.shared_expert_intermediate_size =
        reader.integer("shared_expert_intermediate_size", *a.shared_expert_intermediate_size, 0,
                       kMaxIntermediateSize);
  }

  model.router = a.router;
  model.norm_topk_prob =
      a.top_k_norm == TopKNorm::always ||
      (a.top_k_norm == TopKNorm::from_config && reader.boolean("norm_topk_prob", false));
  if (is_mixer) model.router_jitter_noise = reader.real("router_jitter_noise", 0.01, 0.0, 1.0);
}

void read_moe_layers(const ConfigReader& reader, const Architecture& a, ModelConfig& model) {
  const auto num_layers = static_cast<std::size_t>(model.num_hidden_layers);
  model.is_moe_layer.assign(num_layers, 1);
  if (!a.has_dense_layers) return;
  const auto step =
      static_cast<std::size_t>(reader.integer("decoder_sparse_step", 1, 1, kMaxLayers));
  for (std::size_t i = 0; i < num_layers; ++i) model.is_moe_layer[i] = (i + 1) % step == 0;
  for (const std::int64_t layer : reader.integers("mlp_only_layers", 0, kMaxPositions)) {
    // A layer beyond the last is no error: configs of shortened models keep the list.
    if (layer < model.num_hidden_layers) model.is_moe_layer[static_cast<std::size_t>(layer)] = 0;
  }
  if (model.num_moe_layers() == 0) {
    throw UnsupportedModel(message(reader.where(),
                                   ": fields 'decoder_sparse_step' and "
                                   "'mlp_only_layers' leave no layer with experts, expected at "
                                   "least one: this is not a Mixture-of-Experts model"));
  }
}

// 1 for the layers of Qwen2-MoE that slide.
std::vector<std::uint8_t> sliding_layers(const ConfigReader& reader, std::size_t num_layers,
                                         bool is_on) {
  std::vector<std::uint8_t> slides(num_layers, 0);
  if (reader.has("layer_types")) {
    const json& types = reader.at("layer_types");
    if (!types.is_array() || types.size() != num_layers) {
      reader.fail("layer_types", message("a list of num_hidden_layers, ", num_layers, ", texts"));
    }
    for (std::size_t i = 0; i < num_layers; ++i) {
      slides[i] = types[i] == "sliding_attention";
      if (!slides[i] && types[i] != "full_attention") {
        reader.fail("layer_types", types[i], "full_attention or sliding_attention");
      }
      if (slides[i] && !is_on) {
        reader.fail("layer_types", types[i], "full_attention, as 'use_sliding_window' is false");
      }
    }
    return slides;
  }
  const std::int64_t limit = reader.integer("max_window_layers", 28, 0, kMaxPositions);
  for (std::size_t i = 0; i < num_layers; ++i) {
    slides[i] = is_on && i % 2 == 0 && static_cast<std::int64_t>(i) < limit;
  }
  return slides;
}

void read_sliding_window(const ConfigReader& reader, const Architecture& a, ModelConfig& model) {
  const auto num_layers = static_cast<std::size_t>(model.num_hidden_layers);
  model.sliding_window.assign(num_layers, 0);
  if (a.sliding_window == SlidingWindow::none) return;
  const bool is_switched = a.sliding_window != SlidingWindow::all_layers;
  const bool is_on = !is_switched || reader.boolean("use_sliding_window", false);
  std::vector<std::uint8_t> slides(num_layers, is_on);
  if (a.sliding_window == SlidingWindow::layer_types) {
    slides = sliding_layers(reader, num_layers, is_on);
  }
  if (std::find(slides.begin(), slides.end(), 1) == slides.end()) return;
  // Null is no window, also where the family has a default.
  const std::int64_t absent = reader.is_present("sliding_window") ? 0 : a.window_default;
  const std::int64_t window = reader.integer("sliding_window", absent, 1, kMaxPositions);
  for (std::size_t i = 0; i < num_layers; ++i) model.sliding_window[i] = slides[i] ? window : 0;
}

void read_attention_and_norms(const ConfigReader& reader, const Architecture& a,
                              ModelConfig& model) {
  model.norm = a.norm;
  model.norm_eps = reader.real("rms_norm_eps", a.rms_norm_eps, kMinReal, 1.0);
  model.qk_norm = a.qk_norm;
  if (a.qk_norm == QkNorm::full) {
    model.clip_qkv = reader.optional_real("clip_qkv", kMinReal, kMaxReal);
  }
  if (a.bias != BiasField::none) {
    const bool is_all = a.bias == BiasField::attention_bias;
    model.qkv_bias = reader.boolean(is_all ? "attention_bias" : "qkv_bias", a.bias_default);
    model.o_bias = is_all && model.qkv_bias;
  }
  if (a.norm == NormKind::layer) model.lm_head_bias = reader.boolean("lm_head_bias", false);
  model.tie_word_embeddings = reader.boolean("tie_word_embeddings", false);

  model.attention_multiplier = 1.0 / std::sqrt(static_cast<double>(model.head_dim));
  if (a.has_multipliers) {
    const auto multiplier = [&](const char* key) {
      return reader.real(key, 1.0, kMinReal, kMaxReal);
    };
    model.embedding_multiplier = multiplier("embedding_multiplier");
    model.attention_multiplier = multiplier("attention_multiplier");
    model.residual_multiplier = multiplier("residual_multiplier");
    model.logits_divisor = multiplier("logits_scaling");
  }
}

std::string read_file_of_model(const std::filesystem::path& path) {
  return read_text_file(path, kMaxConfigBytes);
}

}  // namespace

std::int64_t ModelConfig::num_moe_layers() const {
  return std::count(is_moe_layer.begin(), is_moe_layer.end(), std::uint8_t{1});
}

std::size_t ModelConfig::expert_bytes(std::size_t element_bytes) const {
  // A record of three rows for every intermediate index.
  return static_cast<std::size_t>(moe_intermediate_size) * 3 *
         padded(static_cast<std::size_t>(hidden_size)) * element_bytes;
}

ModelConfig parse_model_config(std::string_view json_text, const std::string& where) {
  if (json_text.size() > kMaxConfigBytes) {
    throw FormatError(message(where, ": the config has ", json_text.size(),
                              " bytes, expected at most ", kMaxConfigBytes));
  }
  const json object = parse_json_object(json_text, where);
  const ConfigReader reader(object, where);
  const Architecture& architecture = require_architecture(reader);
  check_computable(reader);

  ModelConfig model;
  model.model_type = architecture.model_type;
  read_sizes(reader, architecture, model);
  read_experts(reader, architecture, model);
  read_moe_layers(reader, architecture, model);
  read_attention_and_norms(reader, architecture, model);
  read_sliding_window(reader, architecture, model);
  model.rope = read_rope_config(reader, architecture, model);

  model.eos_token_ids = reader.integers("eos_token_id", 0, kMaxTokenId);
  if (!reader.is_present("eos_token_id") && architecture.eos_token_id) {
    model.eos_token_ids = {*architecture.eos_token_id};
  }
  model.dtype = reader.text("dtype", reader.text("torch_dtype", ""));
  if (architecture.model_type == "mixtral") model.not_runnable = custom_fields(object);
  return model;
}

ModelConfig load_model_config(const std::filesystem::path& directory) {
  namespace fs = std::filesystem;
  std::error_code error;
  const auto status = fs::status(directory, error);
  if (!fs::exists(status)) {
    throw FileError(message(directory.string(), ": no such directory, expected a model directory"),
                    /*not_found=*/true);
  }
  if (!fs::is_directory(status)) {
    throw FileError(message(directory.string(), ": not a directory, expected a model directory ",
                            "with config.json and safetensors files"));
  }
  const fs::path config_path = directory / "config.json";
  if (!fs::exists(config_path, error)) {
    throw FileError(message(directory.string(), ": not a model directory: it has no config.json; ",
                            "expected config.json and safetensors files of a Hugging Face model"),
                    /*not_found=*/true);
  }
  ModelConfig model = parse_model_config(read_file_of_model(config_path), config_path.string());

  const fs::path generation_path = directory / "generation_config.json";
  if (fs::exists(generation_path, error)) {
    const std::string where = generation_path.string();
    const json object = parse_json_object(read_file_of_model(generation_path), where);
    const ConfigReader reader(object, where);
    if (reader.has("eos_token_id")) {
      model.eos_token_ids = reader.integers("eos_token_id", 0, kMaxTokenId);
    }
  }
  return model;
}

}  // namespace moerun
