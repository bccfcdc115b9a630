// When each expert will probably be used again: from how often steps use it and, where somebody
// knows more, from predictions. Time is counted in layers that run.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace moerun {

// The chances that a step, and the one after it, use each expert: (layers, experts). Either may be
// empty: not known.
struct PathForecast {
  std::vector<float> now;
  std::vector<float> next;
};

// Tells of a step that runs.
class ForecastSource {
 public:
  virtual ~ForecastSource() = default;
  // Nothing as long as it is not known, and again when it has been told.
  virtual std::optional<PathForecast> poll() = 0;
};

// Layers are counted from 0 and all have equally many experts; lists of chances are (layers,
// experts).
class NextUse {
 public:
  NextUse(std::size_t num_layers, std::size_t num_experts);

  // What was known of the step after the last one is now known of this one.
  void begin_step();
  // What is not known is as likely as it was in the last steps. InvalidArgument for another length.
  void expect(PathForecast forecast);
  // The layer's next turn, in this step or in the next one, will use these experts, as far as one
  // can tell.
  void expect(std::size_t layer, std::span<const std::size_t> experts);
  // The step has come to a layer, and uses these experts of it.
  void run(std::size_t layer, std::span<const std::size_t> experts);

  // The expected moment: the layer's next turn, and if the expert is not used then, as many steps
  // more as it usually takes.
  double moment(std::size_t layer, std::size_t expert) const;
  // Of the use after that.
  double moment_after(std::size_t layer, std::size_t expert) const;
  // That it is used at the layer's next turn.
  double chance(std::size_t layer, std::size_t expert) const;

 private:
  std::size_t num_layers_;
  std::size_t num_experts_;
  double begin_ = 0;           // of the step
  std::vector<bool> has_run_;  // (layers)
  std::vector<float> now_;     // empty: not known
  std::vector<float> next_;
  std::vector<double> frequency_;  // share of the last steps, fading
};

}  // namespace moerun
