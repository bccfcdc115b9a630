// Which of the running sequences decode together: those that are predicted to use the same experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/backend.h"
#include "expert/on_off_trial.h"
#include "model/batch_stats.h"
#include "predict/path_predictor.h"
#include "weights/model_config.h"

namespace moerun {

// `automatic`: for as long as it measures no slower than the order of arrival.
enum class ScheduleMode { off, on, automatic };

// "off", "on", "auto"; InvalidArgument for another text.
ScheduleMode schedule_mode_from(const std::string& text);

// Twice as many sequences run as a step decodes, in two batches that take turns. Before a round of
// both, every sequence's experts are predicted from its tokens, and the batches are made anew. Not
// thread-safe.
class BatchScheduler {
 public:
  // Throws what PathPredictor::open throws.
  BatchScheduler(const std::filesystem::path& predictor, const ExpectedModel& expected,
                 std::unique_ptr<Backend> cpu, ScheduleMode mode);

  // A sequence with these tokens begins; the next token of one; it ends.
  void add(std::size_t sequence, std::span<const std::int32_t> tokens);
  void append(std::size_t sequence, std::int32_t token);
  void remove(std::size_t sequence);
  void clear() { sequences_.clear(); }

  // The batches of the next round, of nearly equal size and none above batch_size. `sequences`: all
  // that run, in order of arrival; at most twice batch_size.
  std::vector<std::vector<std::size_t>> divide(std::span<const std::size_t> sequences,
                                               std::size_t batch_size);
  // The last round took so long for each token.
  void record(double token_seconds);

  ScheduleStats stats() const;

 private:
  struct Sequence {
    PathPredictor::State state;
    std::vector<std::int32_t> new_tokens;  // that the predictor has not seen
    std::vector<std::uint64_t> path;
  };

  void predict(std::span<const std::size_t> sequences);

  std::unique_ptr<Backend> cpu_;
  std::unique_ptr<PathPredictor> predictor_;
  ScheduleMode mode_;
  OnOffTrial trial_;
  std::map<std::size_t, Sequence> sequences_;
  ScheduleStats stats_;
};

}  // namespace moerun
