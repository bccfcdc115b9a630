#include "weights/rope_config.h"

#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "io/quote.h"

namespace moerun {
namespace {

constexpr double kMinFactor = 1e-6;
constexpr double kMaxFactor = 1e6;
// A base of one has no frequencies to tell apart (and divides by its logarithm, zero).
constexpr double kMinTheta = 1.01;

void check_not_partial(const ConfigReader& reader) {
  constexpr std::string_view kKey = "partial_rotary_factor";
  if (reader.has(kKey) && reader.real(kKey, 1.0, 0.0, kMaxReal) != 1.0) {
    throw UnsupportedModel(message(reader.field(kKey), ": found ", reader.at(kKey).dump(),
                                   ", expected 1: partly rotated heads are not supported"));
  }
}

RopeKind kind_of(const ConfigReader& rope, const Architecture& architecture) {
  const char* key = rope.has("rope_type") ? "rope_type" : "type";
  const std::string name = rope.text(key, "default");
  const bool is_phi = architecture.router == RouterKind::sparse_mixer;
  if (name == "default") return RopeKind::standard;
  if (name == "longrope" || name == "su") return RopeKind::longrope;
  if (!is_phi) {
    if (name == "linear") return RopeKind::linear;
    if (name == "llama3") return RopeKind::llama3;
    if (name == "yarn") return RopeKind::yarn;
  }
  throw UnsupportedModel(message(rope.field(key), ": found ", quote(name), ", supported for ",
                                 architecture.model_type, " are ",
                                 is_phi ? "default and longrope (also called su)"
                                        : "default, linear, llama3, yarn and longrope"));
}

double ratio_to_original(const RopeConfig& config, const ModelConfig& model) {
  return static_cast<double>(model.max_position_embeddings) /
         static_cast<double>(config.original_max_position_embeddings);
}

double required_factor(const ConfigReader& rope) {
  if (!rope.has("factor")) rope.fail("factor", "a number");
  return rope.real("factor", 1.0, kMinFactor, kMaxFactor);
}

void read_llama3(const ConfigReader& rope, RopeConfig& config) {
  config.factor = required_factor(rope);
  for (const char* key : {"low_freq_factor", "high_freq_factor"}) {
    if (!rope.has(key)) rope.fail(key, "a number");
  }
  config.low_freq_factor = rope.real("low_freq_factor", 1.0, kMinFactor, kMaxFactor);
  config.high_freq_factor = rope.real("high_freq_factor", 4.0, kMinFactor, kMaxFactor);
  if (config.high_freq_factor <= config.low_freq_factor) {
    rope.fail("high_freq_factor", message("more than low_freq_factor, ", config.low_freq_factor));
  }
}

void read_yarn(const ConfigReader& rope, const ModelConfig& model, RopeConfig& config) {
  config.factor = rope.real("factor", ratio_to_original(config, model), kMinFactor, kMaxFactor);
  config.attention_factor = rope.optional_real("attention_factor", kMinFactor, kMaxFactor);
  // Zero stands for "not given" in these four, as it does in Hugging Face's code.
  const double fast = rope.real("beta_fast", 0.0, 0.0, kMaxFactor);
  const double slow = rope.real("beta_slow", 0.0, 0.0, kMaxFactor);
  config.beta_fast = fast > 0.0 ? fast : 32.0;
  config.beta_slow = slow > 0.0 ? slow : 1.0;
  config.mscale = rope.optional_real("mscale", 0.0, kMaxFactor);
  config.mscale_all_dim = rope.optional_real("mscale_all_dim", 0.0, kMaxFactor);
  config.truncate = rope.boolean("truncate", true);
}

void read_longrope(const ConfigReader& rope, const Architecture& architecture,
                   const ModelConfig& model, RopeConfig& config) {
  const auto count = static_cast<std::size_t>(model.head_dim / 2);
  config.short_factor = rope.reals("short_factor", count, kMinFactor, kMaxFactor);
  config.long_factor = rope.reals("long_factor", count, kMinFactor, kMaxFactor);
  config.factor = rope.real("factor", ratio_to_original(config, model), kMinFactor, kMaxFactor);
  config.attention_factor = rope.optional_real("attention_factor", kMinFactor, kMaxFactor);
  if (architecture.router == RouterKind::sparse_mixer) {
    for (const char* key : {"short_mscale", "long_mscale"}) {
      if (!rope.has(key)) rope.fail(key, "a number");
    }
    config.short_mscale = rope.optional_real("short_mscale", kMinFactor, kMaxFactor);
    config.long_mscale = rope.optional_real("long_mscale", kMinFactor, kMaxFactor);
  }
}

}  // namespace

RopeConfig read_rope_config(const ConfigReader& reader, const Architecture& architecture,
                            const ModelConfig& model) {
  // Old files have `rope_scaling` next to `rope_theta`, new ones `rope_parameters` around it.
  // Where a file has both forms, Hugging Face takes the old one.
  const nlohmann::json none = nlohmann::json::object();
  const nlohmann::json* parameters = &none;
  std::string prefix;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!reader.has(key)) continue;
    if (!reader.at(key).is_object()) reader.fail(key, "an object or null");
    if (reader.at(key).empty()) continue;
    parameters = &reader.at(key);
    prefix = std::string(key) + ".";
  }
  const ConfigReader rope(*parameters, reader.where(), prefix);
  for (const char* key : {"full_attention", "sliding_attention"}) {
    if (rope.has(key)) {
      throw UnsupportedModel(message(rope.field(key),
                                     ": found, expected one set of parameters "
                                     "for all layers: a set a layer type is not supported"));
    }
  }
  check_not_partial(reader);
  check_not_partial(rope);

  RopeConfig config;
  config.kind = kind_of(rope, architecture);
  config.theta = rope.real("rope_theta",
                           reader.real("rope_theta", architecture.rope_theta, kMinTheta, kMaxReal),
                           kMinTheta, kMaxReal);
  constexpr std::string_view kOriginal = "original_max_position_embeddings";
  // At least two, since its logarithm divides.
  config.original_max_position_embeddings =
      rope.integer(kOriginal, model.max_position_embeddings, 2, kMaxPositions);
  config.original_max_position_embeddings =
      reader.integer(kOriginal, config.original_max_position_embeddings, 2, kMaxPositions);
  switch (config.kind) {
    case RopeKind::standard:
      break;
    case RopeKind::linear:
      config.factor = required_factor(rope);
      break;
    case RopeKind::llama3:
      read_llama3(rope, config);
      break;
    case RopeKind::yarn:
      read_yarn(rope, model, config);
      break;
    case RopeKind::longrope:
      read_longrope(rope, architecture, model, config);
      break;
  }
  return config;
}

}  // namespace moerun
