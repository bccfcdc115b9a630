#include "replay/simulator.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/error.h"
#include "expert/active_experts.h"
#include "expert/expert_cache.h"
#include "replay/belady_policy.h"
#include "replay/sim_backend.h"
#include "replay/sim_checks.h"
#include "trace/routing_record.h"

namespace moerun {
namespace {

// What computing takes in one layer with experts.
struct LayerCost {
  double attention_s = 0;  // a token
  double byte_s = 0;       // of records, for one use of them
};

// Goes through the layers as Decoder does, with the cache's calls in the same order.
class Driver {
 public:
  Driver(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
         const PieceSizes& sizes, const SimCosts& costs, std::span<const SimSequence> sequences,
         const SimOptions& options);

  SimResult run();

 private:
  enum class Kind { decode, prompt };

  void make_cache(CacheLayout layout, const PieceSizes& sizes);
  std::unique_ptr<CachePolicy> make_belady(std::size_t layer) const;
  LayerCost cost_of(std::size_t index, Kind kind) const;
  const LayerWeights& layer_at(std::size_t index) const { return weights_.layers[layers_[index]]; }
  std::size_t shared_bytes(const LayerWeights& layer) const;

  void run_sequence(const SimSequence& sequence);
  void run_pass(const SimSequence& sequence, std::size_t first, std::size_t count, Kind kind);
  void run_layer(const SimSequence& sequence, std::size_t first, std::size_t count, Kind kind,
                 std::size_t index);
  void compute_cached(const SimSequence& sequence, std::size_t first, std::size_t count, Kind kind,
                      std::size_t index, const ActiveExperts& active, const LayerCost& cost);
  void prefetch(const SimSequence& sequence, std::size_t token, std::size_t index);
  void compute(double seconds);
  std::span<const std::uint16_t> ids_of(std::span<const std::uint16_t> ids,
                                        const SimSequence& sequence, std::size_t index,
                                        std::size_t token) const {
    return ids.subspan((index * sequence.num_tokens + token) * top_k_, top_k_);
  }

  const ModelWeights& weights_;
  std::size_t top_k_;
  const SimCosts& costs_;
  std::span<const SimSequence> sequences_;
  const SimOptions& options_;
  std::vector<std::size_t> layers_;  // those with experts
  VirtualClock clock_;
  SimBackend backend_;
  std::unique_ptr<Stream> stream_;
  SimEngine* engine_ = nullptr;  // the cache's own
  std::unique_ptr<ExpertCache> cache_;
  std::uint64_t warm_bytes_ = 0;  // moved before the first token
  double warm_s_ = 0;             // when it began
  SimResult result_;
};

Driver::Driver(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
               const PieceSizes& sizes, const SimCosts& costs,
               std::span<const SimSequence> sequences, const SimOptions& options)
    : weights_(weights),
      top_k_(top_k),
      costs_(costs),
      sequences_(sequences),
      options_(options),
      stream_(backend_.make_stream()) {
  for (std::size_t layer = 0; layer < weights.layers.size(); ++layer) {
    if (weights.layers[layer].experts.num_experts != 0) layers_.push_back(layer);
  }
  if (!layout.is_resident) make_cache(std::move(layout), sizes);
}

void Driver::make_cache(CacheLayout layout, const PieceSizes& sizes) {
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

std::unique_ptr<CachePolicy> Driver::make_belady(std::size_t layer) const {
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

std::size_t Driver::shared_bytes(const LayerWeights& layer) const {
  if (!layer.has_shared_expert()) return 0;
  return layer.experts.shared_intermediate_size * 3 * padded(layer.experts.hidden_size) *
         size_of(layer.experts.shared_dtype);
}

LayerCost Driver::cost_of(std::size_t index, Kind kind) const {
  const LayerWeights& layer = layer_at(index);
  const auto bytes = static_cast<double>(top_k_ * layer.bytes_per_expert() + shared_bytes(layer));
  const double attention = costs_.attention_s[index];
  const double experts = costs_.moe_s[index];
  if (kind == Kind::decode) return {attention, experts / bytes};
  // A prompt's tokens divide their time between the two as a decoded one does.
  const double whole = attention + experts;
  const double share = whole > 0 ? attention / whole : 1;
  const double prompt = costs_.prompt_s[index];
  return {prompt * share, prompt * (1 - share) / bytes};
}

SimResult Driver::run() {
  for (const SimSequence& sequence : sequences_) run_sequence(sequence);
  result_.seconds = clock_.now() - warm_s_;
  if (cache_ != nullptr) {
    result_.stats = cache_->stats();
    result_.window = cache_->window_hits();
    result_.moved_bytes = engine_->stats().bytes - warm_bytes_;
  }
  return std::move(result_);
}

// As Generation and Session: a prompt goes in chunks, and one of a single token is decoded.
void Driver::run_sequence(const SimSequence& sequence) {
  const double begin = clock_.now();
  std::size_t token = 0;
  while (token < sequence.prompt_tokens) {
    const std::size_t count = std::min(options_.prefill_chunk, sequence.prompt_tokens - token);
    run_pass(sequence, token, count, sequence.prompt_tokens == 1 ? Kind::decode : Kind::prompt);
    token += count;
  }
  if (token != 0) {
    compute(costs_.head_s);
    result_.ttft_s.push_back(clock_.now() - begin);
  }
  for (; token < sequence.num_tokens; ++token) {
    const double token_begin = clock_.now();
    run_pass(sequence, token, 1, Kind::decode);
    compute(costs_.head_s);
    result_.token_s.push_back(clock_.now() - token_begin);
  }
}

void Driver::run_pass(const SimSequence& sequence, std::size_t first, std::size_t count,
                      Kind kind) {
  const double begin = clock_.now();
  if (cache_ != nullptr) cache_->begin_pass(*stream_);
  if (cache_ != nullptr && kind == Kind::decode) cache_->begin_step(1);
  for (std::size_t index = 0; index < layers_.size(); ++index) {
    run_layer(sequence, first, count, kind, index);
    if (options_.between_layers) options_.between_layers();
  }
  if (cache_ == nullptr || kind != Kind::decode) return;
  if (first + 1 < sequence.num_tokens) prefetch(sequence, first + 1, 0);
  cache_->finish_step(clock_.now() - begin);
}

void Driver::run_layer(const SimSequence& sequence, std::size_t first, std::size_t count, Kind kind,
                       std::size_t index) {
  const LayerWeights& layer = layer_at(index);
  const LayerCost cost = cost_of(index, kind);
  compute(cost.attention_s * static_cast<double>(count));
  std::vector<std::int32_t> ids;
  for (std::size_t token = first; token < first + count; ++token) {
    const auto of_token = ids_of(sequence.expert_ids, sequence, index, token);
    ids.insert(ids.end(), of_token.begin(), of_token.end());
  }
  const ActiveExperts active =
      active_experts(ids, layer.experts.num_experts,
                     kind == Kind::decode ? AccessMode::decode : AccessMode::prefill);
  if (cache_ != nullptr) return compute_cached(sequence, first, count, kind, index, active, cost);
  const auto experts = static_cast<double>(ids.size() * layer.bytes_per_expert());
  const auto shared = static_cast<double>(count * shared_bytes(layer));
  clock_.advance((experts + shared) * cost.byte_s);
}

void Driver::compute_cached(const SimSequence& sequence, std::size_t first, std::size_t count,
                            Kind kind, std::size_t index, const ActiveExperts& active,
                            const LayerCost& cost) {
  const LayerWeights& layer = layer_at(index);
  const auto lease =
      cache_->acquire(layers_[index], active.experts,
                      kind == Kind::decode ? AccessMode::decode : AccessMode::prefill);
  if (kind == Kind::decode && index + 1 < layers_.size()) prefetch(sequence, first, index + 1);
  compute(static_cast<double>(count * shared_bytes(layer)) * cost.byte_s);
  std::vector<Segment> segments;
  bool has_waited = false;
  while (lease->next(segments)) {
    if (!has_waited && lease->waited_seconds() > 0) {
      engine_->pause(costs_.wake_s);
      has_waited = true;
    }
    double bytes = 0;
    for (const Segment& segment : segments) {
      bytes += static_cast<double>(segment.records.size() * active.num_uses[segment.expert]);
    }
    compute(bytes * cost.byte_s);
  }
}

void Driver::compute(double seconds) {
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

void Driver::prefetch(const SimSequence& sequence, std::size_t token, std::size_t index) {
  if (sequence.prefetch_ids.empty() || !cache_->wants_prefetch()) return;
  const auto ids = ids_of(sequence.prefetch_ids, sequence, index, token);
  if (ids.front() == kNoExpert) return;
  cache_->prefetch(layers_[index], std::vector<std::size_t>(ids.begin(), ids.end()));
}

}  // namespace

SimResult simulate(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
                   const PieceSizes& sizes, const SimCosts& costs,
                   std::span<const SimSequence> sequences, const SimOptions& options) {
  check_sim_costs(costs, weights.num_moe_layers());
  check_sim_sequences(sequences, weights, top_k);
  if (options.prefill_chunk == 0) {
    throw InvalidArgument("prefill_chunk: expected at least 1, found 0");
  }
  const bool has_predictions =
      std::none_of(sequences.begin(), sequences.end(),
                   [](const SimSequence& each) { return each.prefetch_ids.empty(); });
  if (!has_predictions) {
    if (layout.prefetch == PrefetchMode::on) {
      throw InvalidArgument(
          "prefetch: to simulate it, the trace has to say what would be predicted; record it with "
          "--with-prefetch, or simulate with prefetch off");
    }
    layout.prefetch = PrefetchMode::off;
  }
  const PrefetchMode prefetch = layout.prefetch;
  SimResult result =
      Driver(weights, std::move(layout), top_k, sizes, costs, sequences, options).run();
  result.prefetch = prefetch;
  result.stats.is_direct = sizes.is_direct();
  return result;
}

}  // namespace moerun
