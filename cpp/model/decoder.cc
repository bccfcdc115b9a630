#include "model/decoder.h"

#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "expert/active_experts.h"

namespace moerun {

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, Backend& backend,
                 ExpertCache* cache, const DecoderOptions& options)
    : config_(config),
      weights_(weights),
      backend_(backend),
      cache_(cache),
      options_(options),
      num_active_(weights.num_moe_layers()),
      active_(weights.num_moe_layers()),
      times_(weights.num_moe_layers()),
      rope_(make_rope_table(config)) {
  if (options.segment_records % kQuantumRecords != 0) {
    throw InvalidArgument(message("segment_records: expected a multiple of ", kQuantumRecords,
                                  ", found ", options.segment_records));
  }
  if (options.replay) check_replay(*options.replay);
  attention_shape_ = {static_cast<std::size_t>(config.num_attention_heads),
                      static_cast<std::size_t>(config.num_key_value_heads),
                      static_cast<std::size_t>(config.head_dim)};
  router_ = {config.router, config.norm_topk_prob, static_cast<float>(config.router_jitter_noise),
             static_cast<std::size_t>(config.top_k)};
  if (!backend.is_host()) move_rope();
  const bool wants_host = options.segment_records != 0 || options.replay || options.sync_times;
  if (cache == nullptr && !wants_host) make_expert_tables();
}

void Decoder::make_expert_tables() {
  for (const LayerWeights& layer : weights_.layers) {
    std::vector<Segment> experts;
    const std::size_t count = layer.experts.num_experts + (layer.has_shared_expert() ? 1 : 0);
    for (std::size_t expert = 0; expert < count; ++expert) {
      experts.push_back({expert, 0, layer.experts.num_records(expert), layer.records_of(expert)});
    }
    auto table = backend_.make_expert_table(layer.experts, experts);
    if (!table) return;  // the device wants the host to name the experts
    expert_tables_.push_back(std::move(table));
  }
}

void Decoder::move_rope() {
  const auto stream = backend_.make_stream();
  const std::size_t count = rope_.inv_freq.size();
  device_rope_ = backend_.allocate(2 * count * sizeof(float), "frequencies", MemoryUse::streamed);
  float* target = device_rope_->as<float>();
  for (const auto* from : {&rope_.inv_freq, &rope_.inv_freq_long}) {
    if (from->empty()) continue;
    backend_.copy(*stream, reinterpret_cast<std::byte*>(target),
                  reinterpret_cast<const std::byte*>(from->data()), count * sizeof(float));
    target += count;
  }
  stream->synchronize();
}

// Nobody waits while a pass is recorded; and recording the routing takes time of its own.
bool Decoder::is_timed(const Pass& pass) const {
  return (backend_.is_host() || options_.sync_times) && pass.record == nullptr &&
         pass.input == nullptr && !pass.is_batch();
}

double Decoder::moment(const Pass& pass) const {
  if (!backend_.is_host()) pass.stream.synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Decoder::run(const Pass& pass) {
  const auto begin = std::chrono::steady_clock::now();
  if (is_timed(pass)) {
    const Sequence& sequence = pass.only_sequence();
    times_.begin(sequence.kv_cache, sequence.first_position, sequence.num_tokens, pass.is_decoding,
                 moment(pass));
  }
  if (cache_ != nullptr) cache_->begin_pass(pass.stream);
  if (cache_ != nullptr && pass.is_decoding) {
    cache_->begin_step(pass.sequences.size(), pass.forecasts);
  }
  Workspace& space = pass.workspace;
  const std::size_t tokens = pass.token_ids.size();
  const auto scale = static_cast<float>(config_.embedding_multiplier);
  if (pass.input != nullptr) {
    backend_.embed_token(pass.stream, weights_.embedding, pass.input->token_id, scale,
                         space.hidden.slice(0, 1));
  } else {
    backend_.embed(pass.stream, weights_.embedding, pass.token_ids, scale,
                   space.hidden.slice(0, tokens));
  }
  using Part = NonFinitePlace::Part;
  check_states(pass, space.hidden, {Part::embedding});
  for (std::size_t layer = 0; layer < weights_.layers.size(); ++layer) {
    try {
      run_layer(pass, layer);
      check_states(pass, space.hidden, {Part::layer, layer});
    } catch (const DeviceError& error) {  // which may have been issued in an earlier one
      throw DeviceError(message(error.what(), " (noticed in layer ", layer, ")"),
                        error.needs_restart());
    }
    if (pass.between_layers != nullptr) (*pass.between_layers)();
  }
  if (is_timed(pass)) times_.end();
  if (wants_predictions(pass)) record_predictions(pass, layer_with_experts_from(0), 1);
  // The first layer has no layer before it: this token's last state stands for the next token's.
  if (cache_ != nullptr && pass.is_decoding) prefetch_after(pass, weights_.layers.size());
  backend_.norm(pass.stream, weights_.final_norm, space.hidden.slice(0, tokens),
                space.normed.slice(0, tokens));
  check_states(pass, space.normed, {Part::head});
  if (!pass.is_decoding) return;
  num_decoded_ += pass.sequences.size();
  if (!needs_no_host()) active_.add_step(num_active_);
  if (cache_ == nullptr) return;
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  cache_->finish_step(elapsed.count());
}

void Decoder::run_layer(const Pass& pass, std::size_t index) {
  const LayerWeights& layer = weights_.layers[index];
  const std::size_t tokens = pass.token_ids.size();
  const Activations hidden = pass.workspace.hidden.slice(0, tokens);
  const Activations normed = pass.workspace.normed.slice(0, tokens);
  const Activations qkv = pass.workspace.qkv.slice(0, tokens);
  const Activations attended = pass.workspace.attended.slice(0, tokens);
  const LinearOutput to_residual{static_cast<float>(config_.residual_multiplier),
                                 /*accumulate=*/true};

  backend_.norm(pass.stream, layer.input_norm, hidden, normed);
  backend_.linear(pass.stream, layer.qkv, normed, qkv, {});
  attend(pass, index);
  backend_.linear(pass.stream, layer.o_proj, attended, hidden, to_residual);
  backend_.norm(pass.stream, layer.post_attention_norm, hidden, normed);
  run_experts(pass, index);
}

void Decoder::attend(const Pass& pass, std::size_t index) {
  const LayerWeights& layer = weights_.layers[index];
  const std::size_t tokens = pass.token_ids.size();
  const Activations qkv = pass.workspace.qkv.slice(0, tokens);
  const Activations attended = pass.workspace.attended.slice(0, tokens);
  const AttentionParams attention{static_cast<float>(config_.attention_multiplier),
                                  static_cast<std::size_t>(config_.sliding_window[index]),
                                  /*may_round=*/layer.qkv.weight.dtype != DType::f32};
  if (!pass.is_batch()) {
    const Sequence& sequence = pass.only_sequence();
    const KvLayer kv = sequence.kv_cache->layer(index);
    const Position position = pass.input != nullptr
                                  ? Position(sequence.first_position, pass.input->position)
                                  : Position(sequence.first_position);
    backend_.rotate_and_store(pass.stream, attention_shape_, rotary(layer, sequence.length),
                              position, qkv, kv);
    backend_.attention(pass.stream, attention_shape_, attention, position, qkv, kv, attended);
    return;
  }
  std::vector<SequenceRows> rows;
  rows.reserve(pass.sequences.size());
  for (const Sequence& each : pass.sequences) {
    rows.push_back({each.num_tokens, each.first_position, each.kv_cache->layer(index)});
  }
  // Neighbours that take the same rotary frequencies go together.
  std::size_t first_row = 0;
  for (std::size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    const bool takes_long = is_long(pass.sequences[begin].length);
    std::size_t num_rows = 0;
    for (; end < rows.size() && is_long(pass.sequences[end].length) == takes_long; ++end) {
      num_rows += rows[end].num_rows;
    }
    backend_.rotate_and_store_batch(
        pass.stream, attention_shape_, rotary(layer, pass.sequences[begin].length),
        std::span(rows).subspan(begin, end - begin), qkv.slice(first_row, num_rows));
    first_row += num_rows;
  }
  backend_.attention_batch(pass.stream, attention_shape_, attention, rows, qkv, attended);
}

std::size_t Decoder::num_slots(const LayerWeights& layer) const {
  return (layer.experts.num_experts != 0 ? router_.top_k : 0) + (layer.has_shared_expert() ? 1 : 0);
}

void Decoder::run_experts(const Pass& pass, std::size_t index) {
  const LayerWeights& layer = weights_.layers[index];
  const std::size_t tokens = pass.token_ids.size();
  const bool is_routed = layer.experts.num_experts != 0;
  // The host names the segments, unless the device finds the experts by itself.
  const bool for_host = !needs_no_host() || pass.record != nullptr;
  choose_experts(pass, index, for_host);
  if (for_host) backend_.wait_for_choice(pass.stream, 0);
  const bool is_timed_here = is_routed && is_timed(pass);
  if (is_timed_here) times_.note_routing(moment(pass));
  if (is_routed && pass.is_decoding && options_.replay) replay_routing(pass, index);
  const Routing on_host = pass.workspace.routing_on_host(tokens, num_slots(layer));
  if (is_routed && pass.record != nullptr) record_routing(pass, index, on_host);
  if (is_routed && pass.is_decoding && for_host) count_active(pass, index, on_host);

  double waited_s = 0;
  if (is_routed && cache_ != nullptr) {
    waited_s = compute_cached(pass, index, on_host);
  } else {
    compute_resident(pass, index, on_host);
  }
  if (is_routed && wants_predictions(pass)) {
    record_predictions(pass, layer_with_experts_from(index + 1), 0);
  }
  backend_.finish_experts(pass.stream, static_cast<float>(config_.residual_multiplier),
                          pass.workspace.hidden.slice(0, tokens));
  if (is_timed_here) times_.note_experts(moment(pass), waited_s);
}

// A device predicts the next layer's experts in the same launch; on the host that would only come
// before the demand of this layer.
void Decoder::choose_experts(const Pass& pass, std::size_t index, bool for_host) {
  const LayerWeights& layer = weights_.layers[index];
  const std::size_t tokens = pass.token_ids.size();
  std::vector<RouteRequest> requests(1);
  RouteRequest& own = requests.front();
  own.router = layer.router;
  own.has_shared = layer.has_shared_expert();
  own.shared_gate = layer.shared_gate;
  own.x = pass.workspace.normed.slice(0, tokens);
  own.logits = pass.workspace.router_logits.slice(0, tokens);
  own.routing = pass.workspace.routing(tokens, num_slots(layer));
  if (for_host) own.on_host = pass.workspace.routing_on_host(tokens, num_slots(layer));
  is_predicted_ = false;
  const auto next = layer_with_experts_from(index + 1);
  if (!backend_.is_host() && cache_ != nullptr && pass.is_decoding && !options_.replay &&
      !layer.router.empty() && next && cache_->wants_prefetch()) {
    requests.push_back(predictor_for(pass).request(*next, pass.workspace.hidden.slice(0, tokens)));
    is_predicted_ = true;
  }
  backend_.choose_experts(pass.stream, router_, requests);
  if (!layer.router.empty() && pass.record != nullptr && pass.record->options.with_logits) {
    record_logits(pass, index, own.logits);
  }
}

// `on_host`: the routing where the host can read it, if it needs to.
void Decoder::compute_resident(const Pass& pass, std::size_t index, const Routing& on_host) {
  const LayerWeights& layer = weights_.layers[index];
  const ExpertShape& shape = layer.experts;
  backend_.begin_experts(pass.stream, shape, pass.workspace.normed.slice(0, on_host.tokens),
                         pass.workspace.routing(on_host.tokens, on_host.slots));
  if (needs_no_host()) return backend_.compute_all(pass.stream, *expert_tables_[index]);
  std::vector<std::uint8_t> active(shape.num_experts + 1, 0);
  for (std::size_t pair = 0; pair < on_host.num_pairs(); ++pair) {
    active[static_cast<std::size_t>(on_host.expert_ids[pair])] = 1;
  }
  std::vector<Segment> segments;
  for (std::size_t expert = 0; expert <= shape.num_experts; ++expert) {
    if (!active[expert]) continue;
    const std::size_t records = shape.num_records(expert);
    const std::size_t step = options_.segment_records ? options_.segment_records : records;
    const ConstBytes bytes = layer.records_of(expert);
    const std::size_t record_bytes = bytes.size() / records;
    for (std::size_t first = 0; first < records; first += step) {
      const std::size_t count = std::min(step, records - first);
      segments.push_back(
          {expert, first, count, bytes.subspan(first * record_bytes, count * record_bytes)});
    }
  }
  backend_.compute_segments(pass.stream, segments);
}

void Decoder::count_active(const Pass& pass, std::size_t index, const Routing& on_host) {
  std::size_t& count = num_active_[weights_.moe_index(index)];
  if (!pass.is_batch()) {
    count = router_.top_k;
    return;
  }
  const auto& shape = weights_.layers[index].experts;
  count = active_experts({on_host.expert_ids, on_host.num_pairs()}, shape.num_experts,
                         AccessMode::decode)
              .experts.size();
}

double Decoder::compute_cached(const Pass& pass, std::size_t index, const Routing& on_host) {
  const LayerWeights& layer = weights_.layers[index];
  const ExpertShape& shape = layer.experts;
  const AccessMode mode = pass.is_decoding ? AccessMode::decode : AccessMode::prefill;
  const ActiveExperts active =
      active_experts({on_host.expert_ids, on_host.num_pairs()}, shape.num_experts, mode);
  const auto lease = cache_->acquire(index, active.experts, mode);
  // After the demand is queued, before anything waits for it.
  if (pass.is_decoding) prefetch_after(pass, index);
  backend_.begin_experts(pass.stream, shape, pass.workspace.normed.slice(0, on_host.tokens),
                         pass.workspace.routing(on_host.tokens, on_host.slots));
  if (active.num_uses[shape.num_experts] != 0) {
    const Segment shared{shape.num_experts, 0, shape.num_records(shape.num_experts),
                         layer.records_of(shape.num_experts)};
    backend_.compute_segments(pass.stream, {&shared, 1});
  }
  std::vector<Segment> segments;
  const Checkpointer never;
  const Checkpointer& while_waiting = pass.between_layers != nullptr ? *pass.between_layers : never;
  while (lease->next(segments, while_waiting)) {
    backend_.compute_segments(pass.stream, segments);
    // The next call may overwrite them; copies to a device wait for what computes by themselves.
    if (backend_.is_host()) pass.stream.synchronize();
  }
  return lease->waited_seconds();
}

void Decoder::check_replay(const RoutingReplay& replay) const {
  const auto top_k = static_cast<std::size_t>(config_.top_k);
  const std::size_t expected = replay.tokens * weights_.num_moe_layers() * top_k;
  for (const auto* ids : {&replay.expert_ids, &replay.predicted_ids}) {
    const bool in_range = std::all_of(ids->begin(), ids->end(), [&](std::int32_t id) {
      return id >= 0 && id < config_.num_experts;
    });
    if (replay.tokens == 0 || ids->size() != expected || !in_range) {
      throw InvalidArgument(message("routing_replay: expected ids from 0 to ",
                                    config_.num_experts - 1, " in the shape (tokens, ",
                                    weights_.num_moe_layers(), ", ", top_k, ")"));
    }
  }
}

void Decoder::replay_routing(const Pass& pass, std::size_t index) const {
  const RoutingReplay& replay = *options_.replay;
  const std::size_t token = num_decoded_ % replay.tokens;
  const std::size_t row = (token * weights_.num_moe_layers() + weights_.moe_index(index));
  const Routing on_host = pass.workspace.routing_on_host(1, num_slots(weights_.layers[index]));
  std::copy_n(replay.expert_ids.begin() + static_cast<std::ptrdiff_t>(row * router_.top_k),
              router_.top_k, on_host.expert_ids);
  const Routing routing = pass.workspace.routing(1, on_host.slots);
  if (routing.expert_ids == on_host.expert_ids) return;
  backend_.copy(pass.stream, reinterpret_cast<std::byte*>(routing.expert_ids),
                reinterpret_cast<const std::byte*>(on_host.expert_ids),
                router_.top_k * sizeof(std::int32_t));
}

std::optional<std::size_t> Decoder::layer_with_experts_from(std::size_t index) const {
  for (std::size_t layer = index; layer < weights_.layers.size(); ++layer) {
    if (weights_.layers[layer].experts.num_experts != 0) return layer;
  }
  return std::nullopt;
}

// Predicts and prefetches the first layer with experts after `index`; after the last one, the first
// for the token to come.
void Decoder::prefetch_after(const Pass& pass, std::size_t index) {
  if (!cache_->wants_prefetch()) return;
  if (const auto next = layer_with_experts_from(index + 1)) {
    prefetch_layer(pass, *next, /*is_for_next_token=*/false);
  } else if (index >= weights_.layers.size()) {
    is_predicted_ = false;
    if (const auto first = layer_with_experts_from(0)) {
      prefetch_layer(pass, *first, /*is_for_next_token=*/true);
    }
  }
}

void Decoder::prefetch_layer(const Pass& pass, std::size_t index, bool is_for_next_token) {
  if (options_.replay) {
    const RoutingReplay& replay = *options_.replay;
    const std::uint64_t token = num_decoded_ + (is_for_next_token ? 1 : 0);
    const std::size_t row =
        token % replay.tokens * weights_.num_moe_layers() + weights_.moe_index(index);
    const std::int32_t* predicted = replay.predicted_ids.data() + row * router_.top_k;
    cache_->prefetch(index, std::vector<std::size_t>(predicted, predicted + router_.top_k));
    return;
  }
  NextLayerRouter& predictor = predictor_for(pass);
  const std::size_t tokens = pass.token_ids.size();
  if (!is_predicted_) {
    const RouteRequest request = predictor.request(index, pass.workspace.hidden.slice(0, tokens));
    backend_.choose_experts(pass.stream, router_, {&request, 1});
  }
  backend_.wait_for_choice(pass.stream, is_predicted_ ? 1 : 0);
  cache_->prefetch(index, predictor.predicted_by_all(tokens));
}

// Made for as many tokens as the largest step so far.
NextLayerRouter& Decoder::predictor_for(const Pass& pass) {
  const std::size_t tokens = pass.token_ids.size();
  if (!predictor_ || predictor_->max_tokens() < tokens) {
    pass.stream.synchronize();  // what the old one was used for
    predictor_.emplace(weights_, router_.top_k, backend_, tokens);
  }
  return *predictor_;
}

RotaryParams Decoder::rotary(const LayerWeights& layer, std::size_t sequence_length) const {
  const bool takes_long = is_long(sequence_length);
  RotaryParams params;
  params.inv_freq = takes_long ? rope_.inv_freq_long.data() : rope_.inv_freq.data();
  if (device_rope_) {
    params.inv_freq = device_rope_->as<float>() + (takes_long ? rope_.inv_freq.size() : 0);
  }
  params.scale = takes_long ? rope_.scale_long : rope_.scale;
  params.q_norm = layer.q_norm;
  params.k_norm = layer.k_norm;
  params.norm_per_head = config_.qk_norm == QkNorm::per_head;
  params.clip = static_cast<float>(config_.clip_qkv.value_or(0.0));
  return params;
}

std::size_t Decoder::decode_bytes(std::size_t position) const {
  std::size_t bytes = weights_.embedding.row_bytes() + weights_.lm_head.weight.bytes();
  for (std::size_t index = 0; index < weights_.layers.size(); ++index) {
    const LayerWeights& layer = weights_.layers[index];
    bytes += layer.qkv.weight.bytes() + layer.o_proj.weight.bytes() + layer.router.bytes() +
             layer.shared_gate.bytes() + layer.shared_records.bytes();
    if (layer.experts.num_experts != 0) bytes += router_.top_k * layer.bytes_per_expert();
    const auto window = static_cast<std::size_t>(config_.sliding_window[index]);
    const std::size_t keys = window != 0 ? std::min(window, position + 1) : position + 1;
    bytes += 2 * attention_shape_.num_kv_heads * keys * padded(attention_shape_.head_dim) *
             sizeof(float);
  }
  return bytes;
}

}  // namespace moerun
