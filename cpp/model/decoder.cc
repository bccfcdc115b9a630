#include "model/decoder.h"

#include <algorithm>
#include <chrono>

#include "base/error.h"

namespace moerun {

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, Backend& backend,
                 ExpertCache* cache, const DecoderOptions& options)
    : config_(config),
      weights_(weights),
      backend_(backend),
      cache_(cache),
      options_(options),
      predictor_(weights, backend),
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

void Decoder::run(const Pass& pass) {
  const auto begin = std::chrono::steady_clock::now();
  if (cache_ != nullptr) cache_->begin_pass(pass.stream);
  if (cache_ != nullptr && pass.is_decoding) cache_->begin_token();
  Workspace& space = pass.workspace;
  const std::size_t tokens = pass.token_ids.size();
  backend_.embed(pass.stream, weights_.embedding, pass.token_ids,
                 static_cast<float>(config_.embedding_multiplier), space.hidden.slice(0, tokens));
  for (std::size_t layer = 0; layer < weights_.layers.size(); ++layer) {
    run_layer(pass, layer);
    if (pass.between_layers != nullptr) (*pass.between_layers)();
  }
  // The first layer has no layer before it: this token's last state stands for the next token's.
  if (cache_ != nullptr && pass.is_decoding) prefetch_after(pass, weights_.layers.size());
  backend_.norm(pass.stream, weights_.final_norm, space.hidden.slice(0, tokens),
                space.normed.slice(0, tokens));
  if (!pass.is_decoding) return;
  ++num_decoded_;
  if (cache_ == nullptr) return;
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  cache_->finish_token(elapsed.count());
}

void Decoder::run_layer(const Pass& pass, std::size_t index) {
  const LayerWeights& layer = weights_.layers[index];
  const std::size_t tokens = pass.token_ids.size();
  const Activations hidden = pass.workspace.hidden.slice(0, tokens);
  const Activations normed = pass.workspace.normed.slice(0, tokens);
  const Activations qkv = pass.workspace.qkv.slice(0, tokens);
  const Activations attended = pass.workspace.attended.slice(0, tokens);
  const KvLayer kv = pass.kv_cache.layer(index);
  const LinearOutput to_residual{static_cast<float>(config_.residual_multiplier),
                                 /*accumulate=*/true};
  const AttentionParams attention{static_cast<float>(config_.attention_multiplier),
                                  static_cast<std::size_t>(config_.sliding_window[index]),
                                  /*may_round=*/layer.qkv.weight.dtype != DType::f32};

  backend_.norm(pass.stream, layer.input_norm, hidden, normed);
  backend_.linear(pass.stream, layer.qkv, normed, qkv, {});
  backend_.rotate_and_store(pass.stream, attention_shape_, rotary(layer, pass.sequence_length),
                            pass.first_position, qkv, kv);
  backend_.attention(pass.stream, attention_shape_, attention, pass.first_position, qkv, kv,
                     attended);
  backend_.linear(pass.stream, layer.o_proj, attended, hidden, to_residual);
  backend_.norm(pass.stream, layer.post_attention_norm, hidden, normed);
  run_experts(pass, index);
}

void Decoder::run_experts(const Pass& pass, std::size_t index) {
  const LayerWeights& layer = weights_.layers[index];
  const std::size_t tokens = pass.token_ids.size();
  const ExpertShape& shape = layer.experts;
  const bool routed = shape.num_experts != 0;
  const Activations normed = pass.workspace.normed.slice(0, tokens);
  const Routing routing = pass.workspace.routing(
      tokens, (routed ? router_.top_k : 0) + (layer.has_shared_expert() ? 1 : 0));
  if (routed) {
    const Activations logits = pass.workspace.router_logits.slice(0, tokens);
    backend_.linear(pass.stream, {layer.router, nullptr}, normed, logits,
                    {1, false, /*is_routing=*/true});
    if (pass.record != nullptr && pass.record->options.with_logits) {
      record_logits(pass, index, logits);
    }
    backend_.route(pass.stream, router_, logits, routing);
  }
  if (layer.has_shared_expert()) {
    backend_.route_shared(pass.stream, layer.shared_gate,
                          static_cast<std::int32_t>(shape.num_experts), normed, routing);
  }
  pass.stream.synchronize();  // the host needs the routing to name the segments
  if (routed && pass.is_decoding && options_.replay) replay_routing(index, routing);
  if (routed && pass.record != nullptr) record_routing(pass, index, routing);

  if (routed && cache_ != nullptr) {
    compute_cached(pass, index, routing);
  } else {
    compute_resident(pass, layer, routing);
  }
  backend_.finish_experts(pass.stream, static_cast<float>(config_.residual_multiplier),
                          pass.workspace.hidden.slice(0, tokens));
}

void Decoder::compute_resident(const Pass& pass, const LayerWeights& layer,
                               const Routing& routing) {
  const ExpertShape& shape = layer.experts;
  std::vector<std::uint8_t> active(shape.num_experts + 1, 0);
  for (std::size_t pair = 0; pair < routing.num_pairs(); ++pair) {
    active[static_cast<std::size_t>(routing.expert_ids[pair])] = 1;
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
  backend_.begin_experts(pass.stream, shape, pass.workspace.normed.slice(0, pass.token_ids.size()),
                         routing);
  backend_.compute_segments(pass.stream, segments);
}

void Decoder::compute_cached(const Pass& pass, std::size_t index, const Routing& routing) {
  const LayerWeights& layer = weights_.layers[index];
  const ExpertShape& shape = layer.experts;
  std::vector<std::size_t> num_uses(shape.num_experts + 1, 0);
  std::vector<std::size_t> experts;  // in the router's order
  for (std::size_t pair = 0; pair < routing.num_pairs(); ++pair) {
    const auto expert = static_cast<std::size_t>(routing.expert_ids[pair]);
    if (num_uses[expert]++ == 0 && !shape.is_shared(expert)) experts.push_back(expert);
  }
  // A prompt's empty slots go to the experts that it uses most.
  if (!pass.is_decoding) {
    std::stable_sort(experts.begin(), experts.end(),
                     [&](std::size_t a, std::size_t b) { return num_uses[a] > num_uses[b]; });
  }
  const auto lease =
      cache_->acquire(index, experts, pass.is_decoding ? AccessMode::decode : AccessMode::prefill);
  // After the demand is queued, before anything waits for it.
  if (pass.is_decoding) prefetch_after(pass, index);
  backend_.begin_experts(pass.stream, shape, pass.workspace.normed.slice(0, routing.tokens),
                         routing);
  if (num_uses[shape.num_experts] != 0) {
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

void Decoder::replay_routing(std::size_t index, Routing routing) const {
  const RoutingReplay& replay = *options_.replay;
  const std::size_t token = num_decoded_ % replay.tokens;
  const std::size_t row = (token * weights_.num_moe_layers() + weights_.moe_index(index));
  std::copy_n(replay.expert_ids.begin() + static_cast<std::ptrdiff_t>(row * router_.top_k),
              router_.top_k, routing.expert_ids);
}

void Decoder::record_logits(const Pass& pass, std::size_t index, Activations logits) const {
  std::vector<float> rows(logits.rows * logits.pitch);
  backend_.copy(pass.stream, reinterpret_cast<std::byte*>(rows.data()),
                reinterpret_cast<const std::byte*>(logits.data), rows.size() * sizeof(float));
  pass.stream.synchronize();
  for (std::size_t t = 0; t < logits.rows; ++t) {
    pass.record->record_logits(weights_.moe_index(index), pass.first_position + t,
                               {rows.data() + t * logits.pitch, logits.cols});
  }
}

void Decoder::record_routing(const Pass& pass, std::size_t index, const Routing& routing) const {
  for (std::size_t t = 0; t < routing.tokens; ++t) {
    const std::size_t first = t * routing.slots;
    pass.record->record(weights_.moe_index(index), pass.first_position + t,
                        {routing.expert_ids + first, router_.top_k},
                        {routing.expert_weights + first, router_.top_k});
  }
}

// Predicts and prefetches the first layer with experts after `index`; after the last one, the first
// for the token to come.
void Decoder::prefetch_after(const Pass& pass, std::size_t index) {
  if (!cache_->wants_prefetch()) return;
  for (std::size_t next = index + 1; next < weights_.layers.size(); ++next) {
    if (weights_.layers[next].experts.num_experts != 0) {
      return prefetch_layer(pass, next, num_decoded_);
    }
  }
  if (index < weights_.layers.size()) return;
  for (std::size_t next = 0; next < weights_.layers.size(); ++next) {
    if (weights_.layers[next].experts.num_experts != 0) {
      return prefetch_layer(pass, next, num_decoded_ + 1);
    }
  }
}

void Decoder::prefetch_layer(const Pass& pass, std::size_t index, std::uint64_t token) {
  std::vector<std::size_t> experts;
  if (options_.replay) {
    const RoutingReplay& replay = *options_.replay;
    const std::size_t row =
        token % replay.tokens * weights_.num_moe_layers() + weights_.moe_index(index);
    for (std::size_t i = 0; i < router_.top_k; ++i) {
      experts.push_back(static_cast<std::size_t>(replay.predicted_ids[row * router_.top_k + i]));
    }
  } else {
    experts =
        predictor_.predict(pass.stream, index, pass.workspace.hidden.slice(0, 1), router_.top_k);
  }
  cache_->prefetch(index, experts);
}

RotaryParams Decoder::rotary(const LayerWeights& layer, std::size_t sequence_length) const {
  const bool is_long =
      !rope_.inv_freq_long.empty() && sequence_length > static_cast<std::size_t>(rope_.long_above);
  RotaryParams params;
  params.inv_freq = is_long ? rope_.inv_freq_long.data() : rope_.inv_freq.data();
  if (device_rope_) {
    params.inv_freq = device_rope_->as<float>() + (is_long ? rope_.inv_freq.size() : 0);
  }
  params.scale = is_long ? rope_.scale_long : rope_.scale;
  params.q_norm = layer.q_norm;
  params.k_norm = layer.k_norm;
  params.norm_per_head = config_.qk_norm == QkNorm::per_head;
  params.clip = static_cast<float>(config_.clip_qkv.value_or(0.0));
  return params;
}

void Decoder::compute_logits(const Pass& pass, std::size_t first, Activations logits) const {
  const LinearOutput output{static_cast<float>(1.0 / config_.logits_divisor),
                            /*accumulate=*/false};
  const Activations& staged = pass.workspace.logits;
  if (backend_.is_host()) {
    backend_.linear(pass.stream, weights_.lm_head, pass.workspace.normed.slice(first, logits.rows),
                    logits, output);
    pass.stream.synchronize();
    return;
  }
  for (std::size_t done = 0; done < logits.rows; done += staged.rows) {
    const std::size_t rows = std::min(staged.rows, logits.rows - done);
    backend_.linear(pass.stream, weights_.lm_head, pass.workspace.normed.slice(first + done, rows),
                    staged.slice(0, rows), output);
    for (std::size_t row = 0; row < rows; ++row) {
      backend_.copy(pass.stream, reinterpret_cast<std::byte*>(logits.row(done + row)),
                    reinterpret_cast<const std::byte*>(staged.row(row)),
                    logits.cols * sizeof(float));
    }
    pass.stream.synchronize();
  }
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
