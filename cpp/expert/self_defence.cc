#include "expert/self_defence.h"

#include "base/error.h"

namespace moerun {
namespace {

std::string milliseconds(double seconds) {
  return message(static_cast<double>(static_cast<long>(seconds * 1e5)) / 100, " ms");
}

std::string verdict(const char* what, const OnOffTrial& trial) {
  return message(what, " measured ", milliseconds(trial.seconds_on()), " a token with it and ",
                 milliseconds(trial.seconds_off()),
                 " without: ", trial.is_worth_it() ? "it stays on" : "it is switched off");
}

}  // namespace

SelfDefence::SelfDefence(const CacheLayout& layout, const ExpertCacheOptions& options,
                         bool is_logging)
    : prefetch_(layout.prefetch),
      has_slots_(layout.slot_bytes() != 0),
      is_pool_(layout.is_pool),
      is_logging_(is_logging),
      prefetch_trial_(options.prefetch_trial),
      cache_trial_(options.cache_trial),
      pool_trial_(options.pool_trial) {}

void SelfDefence::restart(const CacheLayout& layout) {
  prefetch_ = layout.prefetch;
  has_slots_ = layout.slot_bytes() != 0;
  prefetch_trial_.restart();
  cache_trial_.restart();
  pool_trial_.restart();
  recent_seconds_ = 0;
  recent_tokens_ = 0;
}

bool SelfDefence::wants_prefetch() const {
  if (prefetch_ != PrefetchMode::automatic) return prefetch_ == PrefetchMode::on;
  return prefetch_trial_.is_on();
}

bool SelfDefence::is_prefetching() const {
  if (prefetch_ != PrefetchMode::automatic) return prefetch_ == PrefetchMode::on;
  return prefetch_trial_.is_worth_it();
}

bool SelfDefence::is_trying() const {
  return prefetch_trial_.is_trying() || cache_trial_.is_trying() || pool_trial_.is_trying();
}

void SelfDefence::record(double seconds, double reading_all_seconds) {
  if (is_paused_) return;
  // One question at a time.
  if (prefetch_ == PrefetchMode::automatic && !cache_trial_.is_trying()) {
    prefetch_trial_.record(seconds);
  }
  if (!has_slots_ || is_logging_ || prefetch_trial_.is_trying()) return;
  // And only where the answer is not plain: tokens without the cache are dear when it works.
  const bool is_plain = is_plainly_worth_it(seconds, reading_all_seconds);
  if (cache_trial_.is_trying() || !is_plain) cache_trial_.record(seconds);
}

void SelfDefence::record_pooled(double token_seconds, bool knows_paths) {
  if (is_paused_) return;
  const bool is_path_token = knows_paths && wants_pool();
  if (prefetch_ == PrefetchMode::automatic && !is_path_token && !pool_trial_.is_trying()) {
    prefetch_trial_.record(token_seconds);
  }
  if (!is_logging_ && !prefetch_trial_.is_trying()) pool_trial_.record(token_seconds);
}

// Whether tokens take, of late, clearly less time than reading all their experts would.
bool SelfDefence::is_plainly_worth_it(double seconds, double reading_all_seconds) {
  constexpr double kClearly = 0.8;
  constexpr double kFading = 1.0 - 1.0 / 64;
  recent_seconds_ = recent_seconds_ * kFading + seconds;
  recent_tokens_ = recent_tokens_ * kFading + 1;
  return cache_trial_.is_worth_it() &&
         recent_seconds_ / recent_tokens_ < kClearly * reading_all_seconds;
}

std::string SelfDefence::reason() const {
  std::string text;
  if (prefetch_ == PrefetchMode::automatic && prefetch_trial_.has_outcome()) {
    text = verdict("prefetch", prefetch_trial_);
  }
  if (cache_trial_.has_outcome()) {
    text += (text.empty() ? "" : "; ") + verdict("the cache", cache_trial_);
  }
  if (pool_trial_.has_outcome()) {
    text += (text.empty() ? "" : "; ") + verdict("prediction", pool_trial_);
  }
  return text;
}

}  // namespace moerun
