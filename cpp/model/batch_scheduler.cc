#include "model/batch_scheduler.h"

#include <algorithm>

#include "base/error.h"
#include "model/routing_paths.h"
#include "model/token_scheduler.h"

namespace moerun {
namespace {

// Rounds are long beside tokens, and a cache is not what decides here.
OnOffTrial::Params trial_params() {
  OnOffTrial::Params params;
  params.warm_up_tokens = 8;
  params.hold_tokens = 512;
  return params;
}

}  // namespace

ScheduleMode schedule_mode_from(const std::string& text) {
  if (text == "off") return ScheduleMode::off;
  if (text == "on") return ScheduleMode::on;
  if (text == "auto") return ScheduleMode::automatic;
  throw InvalidArgument(message("schedule: expected on, off or auto, found '", text, "'"));
}

BatchScheduler::BatchScheduler(const SequencePaths& paths, ScheduleMode mode)
    : paths_(paths), mode_(mode), trial_(trial_params()) {}

std::vector<std::vector<std::size_t>> BatchScheduler::divide(
    std::span<const std::size_t> sequences) {
  const double begin = clock_.now();
  const std::size_t first = (sequences.size() + 1) / 2;
  const std::size_t num_bits = paths_.shape().num_outputs();
  const std::size_t num_words = path_words(num_bits);
  std::vector<std::uint64_t> words;
  words.reserve(sequences.size() * num_words);
  for (const std::size_t number : sequences) {
    const auto path = paths_.path(number);
    words.insert(words.end(), path.begin(), path.end());
  }
  const RoutingPaths paths{words, sequences.size(), num_bits, num_words};
  const std::size_t sizes[] = {first, sequences.size() - first};
  auto batches = split_batches(paths, sizes);
  std::vector<std::size_t> all(sequences.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
  for (const auto& batch : batches) stats_.predicted_experts += num_active_experts(paths, batch);
  for (const std::size_t begin_at : {std::size_t{0}, first}) {
    const std::size_t count = begin_at == 0 ? first : all.size() - first;
    stats_.predicted_in_order += num_active_experts(paths, std::span(all).subspan(begin_at, count));
  }
  for (auto& batch : batches) {
    for (std::size_t& index : batch) index = sequences[index];
  }
  ++stats_.scheduled_rounds;
  stats_.split_seconds += clock_.now() - begin;
  return batches;
}

void BatchScheduler::record(double token_seconds) {
  if (mode_ == ScheduleMode::automatic) trial_.record(token_seconds);
}

ScheduleStats BatchScheduler::stats() const {
  ScheduleStats stats = stats_;
  stats.is_there = true;
  stats.is_active = mode_ == ScheduleMode::on || trial_.is_worth_it();
  if (trial_.has_outcome()) {
    stats.token_seconds_on = trial_.seconds_on();
    stats.token_seconds_off = trial_.seconds_off();
  }
  return stats;
}

}  // namespace moerun
