// Which of the running sequences decode together: those that are predicted to use the same experts.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "expert/on_off_trial.h"
#include "model/batch_stats.h"
#include "model/sequence_paths.h"

namespace moerun {

// `automatic`: for as long as it measures no slower than the order of arrival.
enum class ScheduleMode { off, on, automatic };

// "off", "on", "auto"; InvalidArgument for another text.
ScheduleMode schedule_mode_from(const std::string& text);

// Twice as many sequences run as a step decodes, in two batches that take turns: a round. See
// BatchOutlook. Not thread-safe.
class BatchScheduler {
 public:
  // `paths`: of the sequences; it must outlive this.
  BatchScheduler(const SequencePaths& paths, ScheduleMode mode);

  void begin_round() { ++stats_.rounds; }
  // Whether the next round is worth dividing, and not left in order of arrival.
  bool is_on() const { return mode_ == ScheduleMode::on || trial_.is_on(); }
  // Two batches of nearly equal size, of sequences that are predicted to use the same experts.
  // `sequences`: at least two, predicted, in order of arrival.
  std::vector<std::vector<std::size_t>> divide(std::span<const std::size_t> sequences);
  // The last round took so long for each token.
  void record(double token_seconds);
  // Whether it compares rounds with and without: then nothing else should.
  bool is_trying() const { return trial_.is_trying(); }

  ScheduleStats stats() const;

 private:
  const SequencePaths& paths_;
  ScheduleMode mode_;
  OnOffTrial trial_;
  SteadyClock clock_;
  ScheduleStats stats_;
};

}  // namespace moerun
