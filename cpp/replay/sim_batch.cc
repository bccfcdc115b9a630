#include "replay/sim_batch.h"

#include <algorithm>
#include <utility>

#include "model/batch_steps.h"

namespace moerun {

SimBatch::SimBatch(SimPasses& passes, const SimCosts& costs, std::span<const SimSequence> sequences,
                   const SimOptions& options, bool is_pool)
    : passes_(passes), predict_s_(costs.predict_s), sequences_(sequences), options_(options) {
  stats_.active_experts.resize(passes.num_active().size());
  if (options.predictor.empty()) return;
  auto paths = std::make_unique<SequencePaths>(options.predictor, options.expected,
                                               make_cpu_backend(1, "auto"));
  // Else it was only looked at, as BatchGeneration does.
  if (options.schedule == ScheduleMode::off && !is_pool) return;
  outlook_ = std::make_unique<BatchOutlook>(std::move(paths), options.schedule,
                                            /*in_background=*/false);
}

BatchStats SimBatch::run(SimResult& result) {
  for (;;) {
    const std::vector<std::size_t> joined = join();
    if (!joined.empty()) {
      run_prompts(joined, result);
    } else if (!running_.empty()) {
      run_step(result);
    } else {
      break;
    }
    stats_.most_running = std::max(stats_.most_running, running_.size());
  }
  stats_.finished = sequences_.size();
  stats_.generated_tokens = stats_.decode_tokens + result.ttft_s.size();
  if (outlook_ == nullptr) return stats_;
  stats_.schedule = outlook_->schedule_stats();
  // Real time means nothing here.
  stats_.schedule.split_seconds = 0;
  const PredictionStats predicted = outlook_->stats();
  stats_.prediction.is_there = true;
  stats_.prediction.predictions = predicted.predictions;
  stats_.prediction.sequences = predicted.sequences;
  stats_.prediction.seconds = predict_s_ * static_cast<double>(predicted.sequences);
  return stats_;
}

std::vector<std::size_t> SimBatch::join() {
  std::vector<std::size_t> joined;
  const std::size_t capacity = batch_capacity(options_.batch_size, options_.schedule);
  while (num_joined_ < sequences_.size() && running_.size() + joined.size() < capacity) {
    joined.push_back(num_joined_++);
  }
  return joined;
}

void SimBatch::run_prompts(std::span<const std::size_t> joined, SimResult& result) {
  const double start = passes_.clock().now();
  std::vector<std::size_t> lengths;
  for (const std::size_t number : joined) lengths.push_back(sequences_[number].prompt_tokens);
  std::vector<std::size_t> num_stored(joined.size(), 0);
  for (const auto& pass : prompt_passes(lengths, options_.prefill_chunk)) {
    std::vector<SimRows> rows;
    std::size_t num_ended = 0;
    for (const PromptPiece& piece : pass) {
      rows.push_back(
          {&sequences_[joined[piece.prompt]], num_stored[piece.prompt], piece.num_tokens});
      num_stored[piece.prompt] += piece.num_tokens;
      num_ended += piece.is_last ? 1 : 0;
      stats_.prompt_tokens += piece.num_tokens;
    }
    passes_.run(rows, SimPasses::Kind::prompt);
    passes_.compute_head(num_ended);
    result.ttft_s.insert(result.ttft_s.end(), num_ended, passes_.clock().now() - start);
  }
  stats_.prefill_seconds += passes_.clock().now() - start;
  for (const std::size_t number : joined) begin(number);
}

void SimBatch::begin(std::size_t number) {
  const SimSequence& sequence = sequences_[number];
  running_.push_back({number, sequence.prompt_tokens});
  if (outlook_ == nullptr) return;
  outlook_->add(number, sequence.token_ids.first(sequence.prompt_tokens));
  outlook_->append(number, sequence.token_ids[sequence.prompt_tokens]);
}

void SimBatch::run_step(SimResult& result) {
  VirtualClock& clock = passes_.clock();
  const double start = clock.now();
  const CacheTotals before = cache_totals(passes_.cache());
  const std::vector<Running*> batch = next_batch();
  std::vector<SimRows> rows;
  for (const Running* each : batch) rows.push_back({&sequences_[each->number], each->next, 1});
  passes_.run(rows, SimPasses::Kind::decode, outlook_.get());
  passes_.compute_head(rows.size());
  if (outlook_ != nullptr) {
    stats_.prediction.waited_seconds += std::max(0.0, predicted_at_ - clock.now());
    clock.advance_to(predicted_at_);
    outlook_->finish_step(clock.now() - start);
  }
  const double seconds = clock.now() - start;
  count_cache(stats_, before, cache_totals(passes_.cache()));
  for (std::size_t i = 0; i < stats_.active_experts.size(); ++i) {
    stats_.active_experts[i] += passes_.num_active()[i];
  }
  ++stats_.steps;
  stats_.decode_tokens += batch.size();
  stats_.decode_seconds += seconds;
  result.token_s.insert(result.token_s.end(), batch.size(), seconds);
  const auto is_over = [&](const Running& each) {
    return each.next == sequences_[each.number].num_tokens;
  };
  for (Running* each : batch) {
    ++each->next;
    if (outlook_ == nullptr) continue;
    if (is_over(*each)) {
      outlook_->remove(each->number);
    } else {
      outlook_->append(each->number, sequences_[each->number].token_ids[each->next]);
    }
  }
  std::erase_if(running_, is_over);
}

// What is predicted to choose them comes before the step, the rest beside it.
std::vector<SimBatch::Running*> SimBatch::next_batch() {
  std::vector<std::size_t> numbers;
  for (const Running& each : running_) numbers.push_back(each.number);
  ExpertCache* cache = passes_.cache();
  const auto seconds_since = [&](std::uint64_t predicted) {
    return predict_s_ * static_cast<double>(outlook_->stats().sequences - predicted);
  };
  std::uint64_t predicted = outlook_ != nullptr ? outlook_->stats().sequences : 0;
  numbers = choose_batch(outlook_.get(), cache, numbers, options_.batch_size);
  if (outlook_ != nullptr) {
    passes_.clock().advance(seconds_since(predicted));
    predicted = outlook_->stats().sequences;
    outlook_->begin_step(cache != nullptr && cache->wants_paths());
    predicted_at_ = passes_.clock().now() + seconds_since(predicted);
  }
  std::vector<Running*> batch;
  for (Running& each : running_) {
    if (std::find(numbers.begin(), numbers.end(), each.number) != numbers.end()) {
      batch.push_back(&each);
    }
  }
  return batch;
}

}  // namespace moerun
