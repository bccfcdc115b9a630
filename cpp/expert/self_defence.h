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

  // A token took so long; reading all the experts that it used would have taken about
  // `reading_all_seconds` (0: not known).
  void record(double seconds, double reading_all_seconds);

  // What was decided, trials apart.
  bool is_caching() const { return has_slots_ && cache_trial_.is_worth_it(); }
  bool is_prefetching() const;
  std::string reason() const;  // empty: nothing was tried yet

 private:
  bool is_plainly_worth_it(double seconds, double reading_all_seconds);

  PrefetchMode prefetch_;
  bool has_slots_;
  bool is_logging_;
  OnOffTrial prefetch_trial_;
  OnOffTrial cache_trial_;
  double recent_seconds_ = 0;  // fading sums
  double recent_tokens_ = 0;
};

}  // namespace moerun
