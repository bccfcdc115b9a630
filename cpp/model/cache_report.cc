#include "model/cache_report.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace moerun {
namespace {

using Json = nlohmann::ordered_json;

Json ratio(double amount, double by) { return by > 0 ? Json(amount / by) : Json(nullptr); }

void add_counters(Json& json, const CacheCounters& counters) {
  json["lookups"] = counters.lookups;
  json["hits"] = counters.hits;
  json["top_hits"] = counters.top_hits;
  json["misses"] = counters.misses;
  json["hit_rate"] =
      ratio(static_cast<double>(counters.hits), static_cast<double>(counters.lookups));
  json["ready_rate"] = ratio(static_cast<double>(counters.hits + counters.prefetch_useful),
                             static_cast<double>(counters.lookups));
  json["prefetch_issued"] = counters.prefetch_issued;
  json["prefetch_useful"] = counters.prefetch_useful;
  json["prefetch_late"] = counters.prefetch_late;
  json["prefetch_wasted"] = counters.prefetch_wasted;
  json["demand_bytes"] = counters.demand_bytes;
  json["prefetch_bytes"] = counters.prefetch_bytes;
  json["stalled_s"] = counters.stalled_seconds;
}

Json rates_json(const WindowLayerHits& hits) {
  const auto rate = [&](std::uint64_t count) {
    return ratio(static_cast<double>(count), static_cast<double>(hits.lookups));
  };
  return {{"hit_rate", rate(hits.live)},
          {"static_hit_rate", rate(hits.best_static)},
          {"optimal_hit_rate", rate(hits.optimal)}};
}

Json window_json(const CacheLayout& layout, const WindowHits& window) {
  WindowLayerHits total;
  for (const WindowLayerHits& layer : window.layers) total += layer;
  Json json = {{"tokens", window.num_tokens}};
  json.update(rates_json(total));
  json["layers"] = Json::array();
  for (std::size_t i = 0; i < window.layers.size(); ++i) {
    Json entry = {{"layer", layout.layers[i].layer}};
    entry.update(rates_json(window.layers[i]));
    json["layers"].push_back(std::move(entry));
  }
  return json;
}

std::string reason_of(const CacheLayout& layout, const CacheStats& stats) {
  if (layout.is_resident) return "every expert is in memory";
  if (!stats.reason.empty()) return stats.reason;
  if (layout.policy == "off") return "policy off: experts are read when they are needed";
  return "experts are cached within the budget";
}

}  // namespace

Json host_json(const HostPlan* plan) {
  if (plan == nullptr) return nullptr;
  return {{"tier", name_of(plan->tier)},
          {"pin_limit_bytes", plan->pin_limit_bytes},
          {"page_locked_bytes", plan->page_locked_bytes},
          {"pageable_bytes", plan->pageable_bytes},
          {"disk_bytes", plan->disk_bytes},
          {"ring_bytes", plan->ring_bytes()},
          {"notes", plan->notes}};
}

Json cache_json(const Model& model) {
  const ExpertCache* cache = model.expert_cache();
  if (cache == nullptr) {
    return cache_json(model.cache_layout(), {}, {}, model.expert_bytes(), model.host_plan());
  }
  return cache_json(model.cache_layout(), cache->stats(), cache->window_hits(),
                    model.expert_bytes(), model.host_plan());
}

Json cache_json(const CacheLayout& layout, const CacheStats& stats, const WindowHits& window,
                std::size_t expert_bytes, const HostPlan* host) {
  CacheCounters total;
  for (const CacheCounters& layer : stats.layers) total += layer;

  Json json;
  json["state"] = layout.is_resident ? "resident" : "cached";
  json["policy"] = layout.is_resident ? Json(nullptr) : Json(layout.policy);
  json["prefetch"] = name_of(layout.prefetch);
  json["prefetch_active"] = stats.is_prefetching;
  json["cache_active"] = stats.is_caching;
  json["predictive_active"] = layout.is_pool ? Json(stats.is_predicting) : Json(nullptr);
  json["reason"] = reason_of(layout, stats);
  json["budget_bytes"] = layout.budget_bytes;
  json["total_expert_bytes"] = expert_bytes;
  json["arena_bytes"] = layout.is_resident ? expert_bytes : stats.arena_bytes;
  json["slot_bytes"] = layout.slot_bytes();
  json["ring_bytes"] = layout.ring_bytes();
  json["host"] = host_json(host);
  json["direct_io"] = layout.is_resident ? Json(nullptr) : Json(stats.is_direct);
  json["reconfigured"] = stats.reconfigured;
  json["warm_bytes"] = stats.warm_bytes;
  json["decode_tokens"] = stats.decode_tokens;
  add_counters(json["total"], total);
  json["layers"] = Json::array();
  for (std::size_t i = 0; i < stats.layers.size(); ++i) {
    const LayerLayout& layer = layout.layers[i];
    Json entry = {{"layer", layer.layer}, {"slots", layer.num_slots}, {"split", layer.split}};
    add_counters(entry, stats.layers[i]);
    json["layers"].push_back(std::move(entry));
  }

  json["window"] = layout.is_resident ? Json(nullptr) : window_json(layout, window);

  // The limit of a token: computing, or bringing what was missed over the link at the best rate it
  // has shown, whichever is longer. Guesses that were wrong are no part of it.
  const auto tokens = static_cast<double>(stats.decode_tokens);
  const double link = stats.link_busy_seconds > 0
                          ? static_cast<double>(stats.link_bytes) / stats.link_busy_seconds
                          : 0;
  const double computed = std::max(0.0, stats.decode_seconds - total.stalled_seconds);
  const auto missed =
      static_cast<double>(total.demand_bytes + total.prefetch_bytes - total.wasted_bytes);
  const double limit =
      std::max(computed, stats.best_link_rate > 0 ? missed / stats.best_link_rate : 0);
  json["link_gb_per_s"] = link > 0 ? Json(link / 1e9) : Json(nullptr);
  json["compute_s_per_token"] = ratio(computed, tokens);
  json["stalled_s_per_token"] = ratio(total.stalled_seconds, tokens);
  json["ratio_to_limit"] = ratio(stats.decode_seconds, limit);
  return json;
}

Json reconfiguration_json(const Reconfiguration& changes, double seconds) {
  Json json = {{"bytes_read", changes.bytes_read}, {"seconds", seconds}, {"layers", Json::array()}};
  for (const Reconfiguration::Layer& layer : changes.layers) {
    json["layers"].push_back({{"layer", layer.layer},
                              {"slots_before", layer.slots_before},
                              {"slots", layer.slots},
                              {"split_before", layer.split_before},
                              {"split", layer.split},
                              {"kept", layer.kept},
                              {"dropped", layer.dropped},
                              {"warmed", layer.warmed}});
  }
  return json;
}

}  // namespace moerun
