// Switches off what has measured slower than going without.
#pragma once

#include <string>

#include "expert/cache_layout.h"
#include "expert/on_off_trial.h"

namespace moerun {

class SelfDefence {
 public:
  // `is_logging`: events are logged, which should be the policy's alone: the cache stays on.
  SelfDefence(const CacheLayout& layout, const ExpertCacheOptions& options, bool is_logging);

  // What was measured is of another layout.
  void restart(const CacheLayout& layout);

  // For the coming token.
  bool wants_slots() const { return cache_trial_.is_on(); }
  bool wants_prefetch() const;
  // With the policy predictive: whether it decides by when experts will be used again.
  bool wants_pool() const { return pool_trial_.is_on(); }

  // A token took so long; reading all the experts that it used would have taken about
  // `reading_all_seconds` (0: not known).
  void record(double seconds, double reading_all_seconds);
  // With the policy predictive: each of its tokens took so long. `knows_paths`: nothing else was
  // prefetched.
  void record_pooled(double token_seconds, bool knows_paths);

  // Nothing is measured meanwhile.
  void pause(bool is_paused) { is_paused_ = is_paused; }
  bool is_trying() const;

  // What was decided, trials apart.
  bool is_caching() const { return is_pool_ || (has_slots_ && cache_trial_.is_worth_it()); }
  bool is_prefetching() const;
  bool is_pooling() const { return is_pool_ && pool_trial_.is_worth_it(); }
  std::string reason() const;  // empty: nothing was tried yet

 private:
  bool is_plainly_worth_it(double seconds, double reading_all_seconds);

  PrefetchMode prefetch_;
  bool has_slots_;
  bool is_pool_;
  bool is_logging_;
  bool is_paused_ = false;
  OnOffTrial prefetch_trial_;
  OnOffTrial cache_trial_;
  OnOffTrial pool_trial_;
  double recent_seconds_ = 0;  // fading sums
  double recent_tokens_ = 0;
};

}  // namespace moerun
