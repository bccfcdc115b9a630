#include "expert/on_off_trial.h"

#include <algorithm>

namespace moerun {
namespace {

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

void OnOffTrial::record(double token_seconds) {
  if (!is_trying_) {
    const std::size_t wait = num_trials_ == 0 ? params_.warm_up_tokens : params_.hold_tokens;
    if (++num_waited_ < wait) return;
    is_trying_ = true;
    num_in_trial_ = 0;
    on_.clear();
    off_.clear();
    return;
  }
  // The first token of a window still has what the other way left behind.
  if (num_in_trial_ % params_.window_tokens != 0) {
    (tries_on() ? on_ : off_).push_back(token_seconds);
  }
  if (++num_in_trial_ == 2 * params_.rounds * params_.window_tokens) finish();
}

void OnOffTrial::finish() {
  is_trying_ = false;
  num_waited_ = 0;
  ++num_trials_;
  seconds_on_ = median(on_);
  seconds_off_ = median(off_);
  is_worth_it_ = seconds_on_ <= seconds_off_ * (1 + params_.tolerance);
}

}  // namespace moerun
