// Predicted experts of the sequences that run, of all layers, before the first layer runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "device/backend.h"
#include "predict/path_predictor.h"

namespace moerun {

// Not thread-safe.
class SequencePaths {
 public:
  // `cpu` computes in host memory. Throws what PathPredictor::open throws.
  SequencePaths(const std::filesystem::path& predictor, const ExpectedModel& expected,
                std::unique_ptr<Backend> cpu);

  const PredictorShape& shape() const { return predictor_->shape(); }

  // A sequence with these tokens begins; the next token of one; it ends.
  void add(std::size_t sequence, std::span<const std::int32_t> tokens);
  void append(std::size_t sequence, std::int32_t token);
  void remove(std::size_t sequence) { sequences_.erase(sequence); }
  void clear() { sequences_.clear(); }

  // What the last tokens of these sequences will use, as far as it is not known. Returns of how
  // many it was not.
  std::size_t predict(std::span<const std::size_t> sequences);
  bool are_predicted(std::span<const std::size_t> sequences) const;
  // Of one that has been predicted, its likeliest experts, see RoutingPaths.
  std::span<const std::uint64_t> path(std::size_t sequence) const {
    return sequences_.at(sequence).path;
  }
  // The chance that at least one of these uses an expert: (layers, experts). Nothing of none.
  std::vector<float> chances_of_any(std::span<const std::size_t> sequences) const;

 private:
  struct Sequence {
    PathPredictor::State state;
    std::vector<std::int32_t> new_tokens;  // that the predictor has not seen
    std::vector<float> chances;
    std::vector<std::uint64_t> path;
  };

  std::size_t reach() const;

  std::unique_ptr<Backend> cpu_;
  std::unique_ptr<PathPredictor> predictor_;
  std::map<std::size_t, Sequence> sequences_;
};

}  // namespace moerun
