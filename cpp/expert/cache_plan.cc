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

}  // namespace

CachePlan read_cache_plan(const std::string& path) {
  constexpr std::array<std::string_view, 7> kFields = {
      "version", "model", "policy", "prefetch", "budget_bytes", "layers", "predicted"};
  constexpr std::array<std::string_view, 4> kLayerFields = {"layer", "slots", "split", "experts"};
  const nlohmann::json json = parse_json_object(read_text_file(path, kMaxPlanBytes), path);
  const ConfigReader reader(json, path);
  refuse_unknown(json, reader, kFields);
  if (!reader.has("version")) reader.fail("version", "expected 1, found none");
  reader.integer("version", 0, 1, 1);
  reader.text("model", "");
  if (reader.has("predicted")) check_predicted(reader.at("predicted"), reader, path);
  CachePlan plan;
  plan.policy = reader.text("policy", "lcp");
  plan.prefetch = reader.text("prefetch", "");
  if (!reader.has("budget_bytes")) reader.fail("budget_bytes", "expected bytes, found none");
  plan.budget_bytes = static_cast<std::size_t>(reader.integer("budget_bytes", 0, 1, kMaxBytes));
  if (!reader.has("layers") || !reader.at("layers").is_array()) {
    reader.fail("layers", "expected a list of objects");
  }
  std::size_t index = 0;
  for (const auto& entry : reader.at("layers")) {
    const std::string prefix = "layers[" + std::to_string(index++) + "].";
    if (!entry.is_object()) reader.fail("layers", "expected a list of objects");
    const ConfigReader layer(entry, path, prefix);
    refuse_unknown(entry, layer, kLayerFields);
    for (const char* field : {"layer", "slots", "split"}) {
      if (!layer.has(field)) layer.fail(field, "expected a number, found none");
    }
    PlannedLayer planned;
    planned.layer = static_cast<std::size_t>(layer.integer("layer", 0, 0, kMaxLayers));
    planned.num_slots = static_cast<std::size_t>(layer.integer("slots", 0, 0, kMaxExperts));
    planned.split = entry.at("split") == 0 ? 0.0 : layer.real("split", 0, 0, 1);
    for (const std::int64_t expert : layer.integers("experts", 0, kMaxExperts)) {
      planned.experts.push_back(static_cast<std::size_t>(expert));
    }
    plan.layers.push_back(std::move(planned));
  }
  return plan;
}

}  // namespace moerun
