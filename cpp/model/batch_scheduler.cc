#include "model/batch_scheduler.h"

#include <algorithm>
#include <chrono>
#include <utility>

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

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

ScheduleMode schedule_mode_from(const std::string& text) {
  if (text == "off") return ScheduleMode::off;
  if (text == "on") return ScheduleMode::on;
  if (text == "auto") return ScheduleMode::automatic;
  throw InvalidArgument(message("schedule: expected on, off or auto, found '", text, "'"));
}

BatchScheduler::BatchScheduler(const std::filesystem::path& predictor,
                               const ExpectedModel& expected, std::unique_ptr<Backend> cpu,
                               ScheduleMode mode)
    : cpu_(std::move(cpu)),
      predictor_(PathPredictor::open(predictor, expected, *cpu_)),
      mode_(mode),
      trial_(trial_params()) {}

void BatchScheduler::add(std::size_t sequence, std::span<const std::int32_t> tokens) {
  // What lies further back has no say: every block looks back one window.
  const PredictorShape& shape = predictor_->shape();
  const std::size_t reach = shape.window * shape.num_blocks;
  if (tokens.size() > reach) tokens = tokens.subspan(tokens.size() - reach);
  sequences_.insert_or_assign(
      sequence, Sequence{predictor_->make_state(),
                         {tokens.begin(), tokens.end()},
                         std::vector<std::uint64_t>(path_words(shape.num_outputs()))});
}

void BatchScheduler::append(std::size_t sequence, std::int32_t token) {
  const auto found = sequences_.find(sequence);
  if (found != sequences_.end()) found->second.new_tokens.push_back(token);
}

void BatchScheduler::remove(std::size_t sequence) { sequences_.erase(sequence); }

void BatchScheduler::predict(std::span<const std::size_t> sequences) {
  const PredictorShape& shape = predictor_->shape();
  std::vector<Sequence*> changed;
  std::vector<PathPredictor::Input> inputs;
  for (const std::size_t number : sequences) {
    Sequence& sequence = sequences_.at(number);
    if (sequence.new_tokens.empty()) continue;
    changed.push_back(&sequence);
    inputs.push_back({&sequence.state, sequence.new_tokens});
  }
  if (inputs.empty()) return;
  std::vector<float> probabilities(inputs.size() * shape.num_outputs());
  predictor_->predict(inputs, probabilities);
  for (std::size_t i = 0; i < changed.size(); ++i) {
    set_likeliest(std::span(probabilities).subspan(i * shape.num_outputs(), shape.num_outputs()),
                  shape.num_experts, shape.top_k, changed[i]->path);
    changed[i]->new_tokens.clear();
  }
}

std::vector<std::vector<std::size_t>> BatchScheduler::divide(std::span<const std::size_t> sequences,
                                                             std::size_t batch_size) {
  if (sequences.size() <= batch_size) return {{sequences.begin(), sequences.end()}};
  const std::size_t first = (sequences.size() + 1) / 2;
  ++stats_.rounds;
  if (mode_ == ScheduleMode::automatic && !trial_.is_on()) {
    return {{sequences.begin(), sequences.begin() + static_cast<std::ptrdiff_t>(first)},
            {sequences.begin() + static_cast<std::ptrdiff_t>(first), sequences.end()}};
  }
  ++stats_.scheduled_rounds;
  auto begin = std::chrono::steady_clock::now();
  predict(sequences);
  stats_.predict_seconds += seconds_since(begin);
  begin = std::chrono::steady_clock::now();
  const std::size_t num_words = path_words(predictor_->shape().num_outputs());
  std::vector<std::uint64_t> words;
  words.reserve(sequences.size() * num_words);
  for (const std::size_t number : sequences) {
    const auto& path = sequences_.at(number).path;
    words.insert(words.end(), path.begin(), path.end());
  }
  const RoutingPaths paths{words, sequences.size(), predictor_->shape().num_outputs(), num_words};
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
  stats_.split_seconds += seconds_since(begin);
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
