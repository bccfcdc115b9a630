#include "model/generation.h"

#include <algorithm>
#include <bit>

namespace moerun {
namespace {

std::uint64_t hash_of(std::span<const float> values) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (const float value : values) {
    hash = (hash ^ std::bit_cast<std::uint32_t>(value)) * 0x100000001b3ull;
  }
  return hash;
}

double seconds_between(std::chrono::steady_clock::time_point a,
                       std::chrono::steady_clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

}  // namespace

Generation::Generation(std::shared_ptr<Model> model, std::vector<std::int32_t> prompt,
                       const GenerationParams& params)
    : prompt_((model->check_prompt(prompt), std::move(prompt))),
      params_(params),
      session_(model),
      sampler_(params.sampling, static_cast<std::size_t>(model->config().vocab_size)),
      logits_(static_cast<std::size_t>(model->config().vocab_size)) {
  for (const std::int32_t token : prompt_) sampler_.observe(token);
  stats_.prompt_tokens = prompt_.size();
}

std::optional<std::int32_t> Generation::next(const Checkpointer& between_layers) {
  Model& model = session_.model();
  const Model::Use use(model);
  model.check_open();
  const bool is_first = stats_.generated_tokens == 0;
  if (finished_ || stats_.generated_tokens >= params_.max_new_tokens ||
      (!is_first && session_.num_tokens() >= model.context_length())) {
    return std::nullopt;
  }
  const auto begin = Clock::now();
  finished_ = true;  // unless this call succeeds
  if (is_first) {
    started_ = begin;
    session_.append(prompt_, logits_, between_layers);
    stats_.prefill_seconds = seconds_between(begin, Clock::now());
  } else {
    stats_.decode_bytes += model.decode_bytes(session_.num_tokens());
    session_.append({&last_token_, 1}, logits_, between_layers);
  }
  stats_.logits_hash = hash_of(logits_);
  last_token_ = sampler_.sample(logits_);
  sampler_.observe(last_token_);
  ++stats_.generated_tokens;
  const auto end = Clock::now();
  if (is_first) {
    stats_.ttft_seconds = seconds_between(begin, end);
  } else {
    stats_.decode_seconds += seconds_between(begin, end);
  }
  stats_.kv_cache_bytes = session_.kv_cache_bytes();
  stats_.scratch_bytes = session_.scratch_bytes();
  model.publish(stats_);
  finished_ = std::find(params_.stop_token_ids.begin(), params_.stop_token_ids.end(),
                        last_token_) != params_.stop_token_ids.end();
  return last_token_;
}

}  // namespace moerun
