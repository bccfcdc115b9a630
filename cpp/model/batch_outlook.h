// What is foreseen of the sequences that run: which of them decode together, and which experts they
// will use. As far as tokens are known in time it is worked out beside the steps.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/background_task.h"
#include "base/clock.h"
#include "expert/next_use.h"
#include "model/batch_scheduler.h"
#include "model/batch_stats.h"
#include "model/sequence_paths.h"

namespace moerun {

// One thread calls all of it, but poll().
class BatchOutlook final : public ForecastSource {
 public:
  // `in_background`: predictions are made on a thread of their own while the step runs.
  BatchOutlook(std::unique_ptr<SequencePaths> paths, ScheduleMode mode, bool in_background);
  ~BatchOutlook() override;

  // A sequence with these tokens begins; the next token of one; it ends; all end.
  void add(std::size_t sequence, std::span<const std::int32_t> tokens);
  void append(std::size_t sequence, std::int32_t token);
  void remove(std::size_t sequence) noexcept;
  void clear() noexcept;

  // Those of the next step. `running`: at least one, in order of arrival, each of them added; at
  // most batch_size, or twice as many where batches are scheduled.
  std::vector<std::size_t> next_batch(std::span<const std::size_t> running, std::size_t batch_size);
  // That step begins; if the cache wants its forecast, it comes when it is there.
  void begin_step(bool wants_forecast);
  std::optional<PathForecast> poll() override;
  // It is over, after so long. Throws what predicting threw.
  void finish_step(double seconds);

  // Whether steps with and without scheduling are compared: then nothing else should be.
  bool is_trying() const { return scheduler_ && scheduler_->is_trying(); }
  // Nor the other way round: what was measured of the round does not count.
  void pass_over_round() { is_round_passed_over_ = true; }
  PredictionStats stats() const { return stats_; }  // after finish_step()
  ScheduleStats schedule_stats() const {
    return scheduler_ ? scheduler_->stats() : ScheduleStats{};
  }

 private:
  void begin_round();
  void predict(std::span<const std::size_t> sequences);
  void tell(std::span<const std::size_t> next);
  void wait() noexcept;

  std::unique_ptr<SequencePaths> paths_;
  std::optional<BatchScheduler> scheduler_;
  SteadyClock clock_;
  std::deque<std::vector<std::size_t>> batches_;  // of the round, those to come
  std::vector<std::size_t> now_;
  std::vector<std::size_t> running_;
  std::size_t batch_size_ = 0;
  double round_seconds_ = 0;
  std::size_t round_tokens_ = 0;
  bool is_round_passed_over_ = false;
  PredictionStats stats_{.is_there = true};
  std::mutex mutex_;  // guards the forecast
  std::optional<PathForecast> forecast_;
  std::optional<BackgroundTask> task_;  // last: it works on all of the above
};

}  // namespace moerun
