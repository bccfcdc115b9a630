// Steps of decoding: what they took, and what the cache learns from that.
#include <algorithm>

#include "expert/expert_cache.h"

namespace moerun {

void ExpertCache::begin_step(std::size_t num_tokens, ForecastSource* forecasts) {
  const std::lock_guard lock(stats_mutex_);
  engine_->look();  // or what ended while the last token was sampled would go on being busy
  step_tokens_ = num_tokens;
  if (!is_between_steps_) link_before_ = engine_->stats();
  if (pool_) begin_pool_step(forecasts);
  // The window is of one sequence at a time.
  if (num_tokens != 1) return;
  window_.begin_token([this](std::size_t index) { return residents_of(index); });
}

void ExpertCache::finish_step(double seconds) {
  const std::lock_guard lock(stats_mutex_);
  const TransferStats link = engine_->stats();
  const TransferStats used = {link.bytes - link_before_.bytes,
                              link.busy_seconds - link_before_.busy_seconds};
  // What is read while the token is sampled belongs to the next one.
  link_before_ = link;
  is_between_steps_ = true;
  decode_link_.bytes += used.bytes;
  decode_link_.busy_seconds += used.busy_seconds;
  measure_link(used);
  decode_tokens_ += step_tokens_;
  ++decode_steps_;
  if (step_tokens_ == 1) window_.finish_token();
  decode_seconds_ += seconds;
  double bytes = 0;
  for (const LayerState& layer : layers_) {
    bytes += static_cast<double>(layer.counters.lookups * layer.num_records * layer.record_bytes);
  }
  bytes /= static_cast<double>(decode_steps_);
  const double reading_s = best_link_rate_ > 0 ? bytes / best_link_rate_ : 0;
  if (pool_) {
    choose_depth(used.busy_seconds / seconds, stalled_seconds_ / seconds);
    forecasts_ = nullptr;
    defence_.record_pooled(seconds / static_cast<double>(step_tokens_), knows_paths_);
  } else {
    defence_.record(seconds, reading_s);
  }
}

void ExpertCache::pause_trials(bool is_paused) {
  const std::lock_guard lock(stats_mutex_);
  defence_.pause(is_paused);
}

bool ExpertCache::is_trying() const {
  const std::lock_guard lock(stats_mutex_);
  return defence_.is_trying();
}

void ExpertCache::measure_link(const TransferStats& used) {
  constexpr std::uint64_t kLongEnough = std::uint64_t{32} << 20;
  stretch_.bytes += used.bytes;
  stretch_.busy_seconds += used.busy_seconds;
  if (stretch_.bytes < kLongEnough || stretch_.busy_seconds <= 0) return;
  best_link_rate_ =
      std::max(best_link_rate_, static_cast<double>(stretch_.bytes) / stretch_.busy_seconds);
  stretch_ = {};
}

CacheStats ExpertCache::stats() const {
  const std::lock_guard lock(stats_mutex_);
  CacheStats stats;
  for (const LayerState& layer : layers_) stats.layers.push_back(layer.counters);
  stats.decode_tokens = decode_tokens_;
  stats.decode_seconds = decode_seconds_;
  stats.warm_bytes = warm_bytes_;
  stats.reconfigured = num_reconfigured_;
  stats.arena_bytes = arena_bytes_;
  stats.link_bytes = decode_link_.bytes;
  stats.link_busy_seconds = decode_link_.busy_seconds;
  // Too little was read to tell a best rate from the mean.
  const double mean = decode_link_.busy_seconds > 0
                          ? static_cast<double>(decode_link_.bytes) / decode_link_.busy_seconds
                          : 0;
  stats.best_link_rate = std::max(best_link_rate_, mean);
  stats.is_direct = store_ == nullptr || store_->is_direct();
  stats.is_caching = defence_.is_caching();
  stats.is_prefetching = defence_.is_prefetching();
  stats.is_predicting = defence_.is_pooling();
  stats.reason = defence_.reason();
  if (!stats.is_direct) {
    stats.reason += std::string(stats.reason.empty() ? "" : "; ") +
                    "direct reads are refused here: they pass through the page cache";
  }
  return stats;
}

}  // namespace moerun
