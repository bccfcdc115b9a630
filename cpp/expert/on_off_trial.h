// Finds out by measuring whether something is worth having.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moerun {

// Measures windows of tokens with and without, keeps what was faster, and looks again after a
// while. Times come from the caller, so that a virtual clock will do.
class OnOffTrial {
 public:
  struct Params {
    std::size_t warm_up_tokens = 32;  // before the first trial: an empty cache says nothing
    std::size_t window_tokens = 8;    // measured each way, in turns
    std::size_t rounds = 2;           // turns
    std::size_t hold_tokens = 1024;   // until the next trial
    double tolerance = 0.02;          // "on" stays unless it is slower by more than this
  };

  OnOffTrial() : OnOffTrial(Params{}) {}
  explicit OnOffTrial(const Params& params) : params_(params) {}

  // Whether to have it for the coming token.
  bool is_on() const { return is_trying_ ? tries_on() : is_worth_it_; }
  bool is_trying() const { return is_trying_; }
  // The outcome of the last trial.
  bool is_worth_it() const { return is_worth_it_; }
  bool has_outcome() const { return num_trials_ != 0; }
  double seconds_on() const { return seconds_on_; }  // median token of the last trial
  double seconds_off() const { return seconds_off_; }
  void record(double token_seconds);
  // Forgets what was measured.
  void restart() { *this = OnOffTrial(params_); }

 private:
  bool tries_on() const { return num_in_trial_ / params_.window_tokens % 2 == 0; }
  void finish();

  Params params_;
  bool is_worth_it_ = true;
  bool is_trying_ = false;
  std::size_t num_waited_ = 0;
  std::size_t num_in_trial_ = 0;
  std::size_t num_trials_ = 0;
  std::vector<double> on_;
  std::vector<double> off_;
  double seconds_on_ = 0;
  double seconds_off_ = 0;
};

}  // namespace moerun
