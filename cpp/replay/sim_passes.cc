#include "replay/sim_passes.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "predict/next_layer_router.h"
#include "replay/belady_policy.h"
#include "trace/routing_record.h"

namespace moerun {
namespace {

// What a token of a prompt takes of what a decoded one does, in all layers together; at most all.
double share_of_prompt_token(const SimCosts& costs) {
  const auto sum = [](const std::vector<double>& list) {
    return std::accumulate(list.begin(), list.end(), 0.0);
  };
  const double decoded = sum(costs.attention_s) + sum(costs.moe_s);
  return decoded > 0 ? std::min(1.0, sum(costs.prompt_s) / decoded) : 1;
}

}  // namespace

SimPasses::SimPasses(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
                     const PieceSizes& sizes, const SimCosts& costs,
                     std::span<const SimSequence> sequences, const SimOptions& options)
    : weights_(weights),
      top_k_(top_k),
      costs_(costs),
      sequences_(sequences),
      options_(options),
      stream_(backend_.make_stream()),
      further_head_(share_of_prompt_token(costs)) {
  for (std::size_t layer = 0; layer < weights.layers.size(); ++layer) {
    if (weights.layers[layer].experts.num_experts != 0) layers_.push_back(layer);
  }
  num_active_.resize(layers_.size());
  if (!layout.is_resident) make_cache(std::move(layout), sizes);
}

void SimPasses::make_cache(CacheLayout layout, const PieceSizes& sizes) {
  ExpertCacheOptions options = options_.cache;
  options.stand_ins.clock = &clock_;
  options.stand_ins.make_engine = [&](Progress& progress) {
    auto engine = std::make_unique<SimEngine>(sizes, costs_.link, progress, clock_);
    engine_ = engine.get();
    return engine;
  };
  if (options_.is_belady) {
    options.stand_ins.make_policy = [this](std::size_t layer) { return make_belady(layer); };
  }
  cache_ = std::make_unique<ExpertCache>(weights_, std::move(layout), nullptr, nullptr, options,
                                         options_.sink, backend_);
  // As Model::load does, before the first token.
  cache_->begin_pass(*stream_);
  for (const LayerLayout& layer : cache_->layout().layers) {
    cache_->warm(layer.layer, layer.warm_experts, options_.between_layers);
  }
  warm_bytes_ = engine_->stats().bytes;
  warm_s_ = clock_.now();
}

std::unique_ptr<CachePolicy> SimPasses::make_belady(std::size_t layer) const {
  const auto index = weights_.moe_index(layer);
  std::vector<std::size_t> future;
  for (const SimSequence& sequence : sequences_) {
    // A prompt of one token is decoded.
    const std::size_t first = sequence.prompt_tokens == 1 ? 0 : sequence.prompt_tokens;
    for (std::size_t token = first; token < sequence.num_tokens; ++token) {
      const auto ids = ids_of(sequence.expert_ids, sequence, index, token);
      future.insert(future.end(), ids.begin(), ids.end());
    }
  }
  return std::make_unique<BeladyPolicy>(weights_.layers[layer].experts.num_experts, top_k_, future);
}

std::size_t SimPasses::shared_bytes(const LayerWeights& layer) const {
  if (!layer.has_shared_expert()) return 0;
  return layer.experts.shared_intermediate_size * 3 * padded(layer.experts.hidden_size) *
         size_of(layer.experts.shared_dtype);
}

SimPasses::LayerCost SimPasses::cost_of(std::size_t index, Kind kind) const {
  const LayerWeights& layer = layer_at(index);
  const auto bytes = static_cast<double>(top_k_ * layer.bytes_per_expert() + shared_bytes(layer));
  const double attention = costs_.attention_s[index];
  const double experts = costs_.moe_s[index];
  // A prompt's tokens divide their time between the two as a decoded one does.
  const double whole = attention + experts;
  const double share = whole > 0 ? attention / whole : 1;
  const double prompt = costs_.prompt_s[index];
  const double prompt_attention = prompt * share;
  const double prompt_byte = prompt * (1 - share) / bytes;
  if (kind == Kind::prompt) return {prompt_attention, prompt_attention, prompt_byte, prompt_byte};
  return {attention, prompt_attention, experts / bytes, prompt_byte};
}

void SimPasses::report(SimResult& result) const {
  result.seconds = clock_.now() - warm_s_;
  if (cache_ == nullptr) return;
  result.stats = cache_->stats();
  result.window = cache_->window_hits();
  result.moved_bytes = engine_->stats().bytes - warm_bytes_;
}

void SimPasses::run(std::span<const SimRows> rows, Kind kind, ForecastSource* forecasts) {
  const double begin = clock_.now();
  if (cache_ != nullptr) cache_->begin_pass(*stream_);
  if (cache_ != nullptr && kind == Kind::decode) cache_->begin_step(rows.size(), forecasts);
  for (std::size_t index = 0; index < layers_.size(); ++index) {
    run_layer(rows, kind, index);
    if (options_.between_layers) options_.between_layers();
  }
  if (cache_ == nullptr || kind != Kind::decode) return;
  prefetch(rows, 1, 0);
  cache_->finish_step(clock_.now() - begin);
}

// Its weights are read once; the share is a guess from the layers, for nobody measures it.
void SimPasses::compute_head(std::size_t num_tokens) {
  if (num_tokens == 0) return;
  compute(costs_.head_s * (1 + static_cast<double>(num_tokens - 1) * further_head_));
}

void SimPasses::run_layer(std::span<const SimRows> rows, Kind kind, std::size_t index) {
  const LayerWeights& layer = layer_at(index);
  std::vector<std::int32_t> ids;
  std::size_t num_tokens = 0;
  for (const SimRows& each : rows) {
    num_tokens += each.count;
    for (std::size_t token = each.first; token < each.first + each.count; ++token) {
      const auto of_token = ids_of(each.sequence->expert_ids, *each.sequence, index, token);
      ids.insert(ids.end(), of_token.begin(), of_token.end());
    }
  }
  if (layer.has_shared_expert()) {
    ids.insert(ids.end(), num_tokens, static_cast<std::int32_t>(layer.experts.num_experts));
  }
  compute(cost_of(index, kind).of_attention(num_tokens));
  const ActiveExperts active =
      active_experts(ids, layer.experts.num_experts,
                     kind == Kind::decode ? AccessMode::decode : AccessMode::prefill);
  num_active_[index] = active.experts.size();
  if (cache_ != nullptr) return compute_cached(rows, kind, index, active);
  const LayerCost cost = cost_of(index, kind);
  double seconds = 0;
  for (const std::size_t expert : active.experts) {
    seconds += cost.of_bytes(layer.bytes_per_expert(), active.num_uses[expert]);
  }
  if (layer.has_shared_expert()) seconds += cost.of_bytes(shared_bytes(layer), num_tokens);
  clock_.advance(seconds);
}

void SimPasses::compute_cached(std::span<const SimRows> rows, Kind kind, std::size_t index,
                               const ActiveExperts& active) {
  const LayerWeights& layer = layer_at(index);
  const LayerCost cost = cost_of(index, kind);
  const auto lease =
      cache_->acquire(layers_[index], active.experts,
                      kind == Kind::decode ? AccessMode::decode : AccessMode::prefill);
  if (kind == Kind::decode && index + 1 < layers_.size()) prefetch(rows, 0, index + 1);
  if (layer.has_shared_expert()) {
    compute(cost.of_bytes(shared_bytes(layer), active.num_uses[layer.experts.num_experts]));
  }
  std::vector<Segment> segments;
  bool has_waited = false;
  while (lease->next(segments)) {
    if (!has_waited && lease->waited_seconds() > 0) {
      engine_->pause(costs_.wake_s);
      has_waited = true;
    }
    double seconds = 0;
    for (const Segment& segment : segments) {
      seconds += cost.of_bytes(segment.records.size(), active.num_uses[segment.expert]);
    }
    compute(seconds);
  }
}

void SimPasses::compute(double seconds) {
  const double factor = 1 + costs_.slowdown;
  while (engine_ != nullptr && factor > 1) {
    const auto until = engine_->busy_until();
    if (!until) break;
    const double room = (*until - clock_.now()) / factor;
    if (seconds <= room) return clock_.advance(seconds * factor);
    clock_.advance_to(*until);
    seconds -= room;
  }
  clock_.advance(seconds);
}

void SimPasses::prefetch(std::span<const SimRows> rows, std::size_t ahead, std::size_t index) {
  if (!cache_->wants_prefetch()) return;
  std::vector<std::int32_t> named;
  for (const SimRows& each : rows) {
    const std::size_t token = each.first + ahead;
    if (each.sequence->prefetch_ids.empty() || token >= each.sequence->num_tokens) continue;
    const auto ids = ids_of(each.sequence->prefetch_ids, *each.sequence, index, token);
    if (ids.front() != kNoExpert) named.insert(named.end(), ids.begin(), ids.end());
  }
  if (named.empty()) return;
  const std::size_t num_experts = layer_at(index).experts.num_experts;
  cache_->prefetch(layers_[index], named_by_all(named, top_k_, num_experts));
}

}  // namespace moerun
