#include "expert/cache_plan.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.h"
#include "io/json_text.h"
#include "weights/config_reader.h"

namespace moerun {
namespace {

constexpr std::uint64_t kMaxPlanBytes = 16 << 20;
constexpr std::int64_t kMaxBytes = std::int64_t{1} << 50;
constexpr double kMaxPredicted = 1e18;

template <std::size_t n>
void refuse_unknown(const nlohmann::json& object, const ConfigReader& reader,
                    const std::array<std::string_view, n>& known) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    std::string names;
    for (const auto name : known) names += (names.empty() ? "" : ", ") + std::string(name);
    throw FormatError(message(reader.field(key), ": not a field of a plan; it has ", names));
  }
}

// What a planner expected of its plan: for people and tools, the cache does not read it.
void check_predicted(const nlohmann::json& predicted, const ConfigReader& reader,
                     const std::string& path) {
  constexpr std::array<std::string_view, 6> kFields = {
      "hit_rate", "tpot_ms", "ttft_ms", "stalled_ms", "bytes_per_token", "prompt_tokens"};
  if (!predicted.is_object()) reader.fail("predicted", "an object");
  const ConfigReader fields(predicted, path, "predicted.");
  refuse_unknown(predicted, fields, kFields);
  for (const auto& [key, value] : predicted.items()) {
    fields.real(key, 0, 0, key == "hit_rate" ? 1 : kMaxPredicted);
  }
}

// Which model the plan is of: who loads the model compares it.
void check_model_id(const std::string& id, const ConfigReader& reader) {
  constexpr std::size_t kDigits = 16;
  const bool is_hex = id.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!reader.has("model_id") || (is_hex && id.size() == kDigits)) return;
  reader.fail("model_id", message(kDigits, " hexadecimal digits"));
}

std::vector<std::size_t> expert_ids(const ConfigReader& layer, std::string_view field) {
  std::vector<std::size_t> ids;
  for (const std::int64_t expert : layer.integers(field, 0, kMaxExperts)) {
    ids.push_back(static_cast<std::size_t>(expert));
  }
  return ids;
}

void check_warm(const PlannedLayer& planned, const ConfigReader& layer, const std::string& policy) {
  if (planned.warm.empty()) return;
  if (policy == "off") layer.fail("warm", "no experts (policy off caches nothing)");
  if (policy == "static") {
    layer.fail("warm", "no list (with policy static, experts says which get slots)");
  }
  if (planned.warm.size() > planned.num_slots) {
    layer.fail("warm", message("at most ", planned.num_slots, " experts, one a slot, found ",
                               planned.warm.size()));
  }
  auto sorted = planned.warm;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    layer.fail("warm", message("every expert once, found ", *twice, " twice"));
  }
}

}  // namespace

CachePlan read_cache_plan(const std::string& path) {
  return parse_cache_plan(read_text_file(path, kMaxPlanBytes), path);
}

CachePlan parse_cache_plan(const std::string& text, const std::string& path) {
  constexpr std::array<std::string_view, 9> kFields = {"version", "model",    "model_id",
                                                       "policy",  "prefetch", "budget_bytes",
                                                       "layers",  "resident", "predicted"};
  constexpr std::array<std::string_view, 5> kLayerFields = {"layer", "slots", "split", "experts",
                                                            "warm"};
  const nlohmann::json json = parse_json_object(text, path);
  const ConfigReader reader(json, path);
  refuse_unknown(json, reader, kFields);
  if (!reader.has("version")) reader.fail("version", "1");
  reader.integer("version", 0, 1, 1);
  reader.text("model", "");
  check_model_id(reader.text("model_id", ""), reader);
  if (reader.has("predicted")) check_predicted(reader.at("predicted"), reader, path);
  CachePlan plan;
  plan.policy = reader.text("policy", "lcp");
  plan.prefetch = reader.text("prefetch", "");
  if (!reader.has("budget_bytes")) reader.fail("budget_bytes", "a number of bytes");
  plan.budget_bytes = static_cast<std::size_t>(reader.integer("budget_bytes", 0, 1, kMaxBytes));
  plan.is_resident = reader.boolean("resident", false);
  if (plan.is_resident && !reader.has("layers")) return plan;
  if (!reader.has("layers") || !reader.at("layers").is_array()) {
    reader.fail("layers", "a list of objects");
  }
  std::size_t index = 0;
  for (const auto& entry : reader.at("layers")) {
    const std::string prefix = "layers[" + std::to_string(index++) + "].";
    if (!entry.is_object()) reader.fail("layers", "a list of objects");
    const ConfigReader layer(entry, path, prefix);
    refuse_unknown(entry, layer, kLayerFields);
    for (const char* field : {"layer", "slots", "split"}) {
      if (!layer.has(field)) layer.fail(field, "expected a number, found none");
    }
    PlannedLayer planned;
    planned.layer = static_cast<std::size_t>(layer.integer("layer", 0, 0, kMaxLayers));
    planned.num_slots = static_cast<std::size_t>(layer.integer("slots", 0, 0, kMaxExperts));
    planned.split = entry.at("split") == 0 ? 0.0 : layer.real("split", 0, 0, 1);
    planned.experts = expert_ids(layer, "experts");
    planned.warm = expert_ids(layer, "warm");
    check_warm(planned, layer, plan.policy);
    plan.layers.push_back(std::move(planned));
  }
  return plan;
}

}  // namespace moerun
