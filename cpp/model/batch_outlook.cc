#include "model/batch_outlook.h"

#include <algorithm>
#include <utility>

namespace moerun {
namespace {

bool is_in(std::span<const std::size_t> numbers, std::size_t number) {
  return std::find(numbers.begin(), numbers.end(), number) != numbers.end();
}

}  // namespace

BatchOutlook::BatchOutlook(std::unique_ptr<SequencePaths> paths, ScheduleMode mode,
                           bool in_background)
    : paths_(std::move(paths)) {
  if (mode != ScheduleMode::off) scheduler_.emplace(*paths_, mode);
  if (in_background) task_.emplace();
}

BatchOutlook::~BatchOutlook() = default;

// What it threw is of no use any more.
void BatchOutlook::wait() noexcept {
  try {
    if (task_) task_->wait();
  } catch (...) {
  }
}

void BatchOutlook::add(std::size_t sequence, std::span<const std::int32_t> tokens) {
  if (task_) task_->wait();
  paths_->add(sequence, tokens);
}

void BatchOutlook::append(std::size_t sequence, std::int32_t token) {
  if (task_) task_->wait();
  paths_->append(sequence, token);
}

void BatchOutlook::remove(std::size_t sequence) noexcept {
  wait();
  paths_->remove(sequence);
}

void BatchOutlook::clear() noexcept {
  wait();
  paths_->clear();
  batches_.clear();
}

std::vector<std::size_t> BatchOutlook::next_batch(std::span<const std::size_t> running,
                                                  std::size_t batch_size) {
  running_.assign(running.begin(), running.end());
  batch_size_ = batch_size;
  now_.clear();
  if (!scheduler_) now_ = running_;
  while (now_.empty()) {  // those of a batch may all have ended
    if (batches_.empty()) begin_round();
    now_ = std::move(batches_.front());
    batches_.pop_front();
    std::erase_if(now_, [&](std::size_t number) { return !is_in(running, number); });
  }
  return now_;
}

// Only now: what the tokens of the last step use is not known before they are, and with what the
// tokens before them used, half of the gain is lost (docs/batching.md).
void BatchOutlook::begin_round() {
  if (round_tokens_ != 0 && !is_round_passed_over_) {
    scheduler_->record(round_seconds_ / static_cast<double>(round_tokens_));
  }
  round_seconds_ = 0;
  round_tokens_ = 0;
  is_round_passed_over_ = false;
  if (running_.size() <= batch_size_) return batches_.push_back(running_);
  scheduler_->begin_round();
  if (scheduler_->is_on()) {
    if (task_) task_->wait();
    predict(running_);
    for (auto& batch : scheduler_->divide(running_)) batches_.push_back(std::move(batch));
    return;
  }
  // As if nobody knew of the others: two batches that take turns would take each other's experts
  // out of the cache.
  batches_.emplace_back(running_.begin(),
                        running_.begin() + static_cast<std::ptrdiff_t>(batch_size_));
}

void BatchOutlook::begin_step(bool wants_forecast) {
  if (task_) task_->wait();
  {
    const std::lock_guard lock(mutex_);
    forecast_.reset();
  }
  // Those that run later have their tokens, and will be asked about.
  std::vector<std::size_t> later;
  const bool is_scheduled = scheduler_ && running_.size() > batch_size_ && scheduler_->is_on();
  if (is_scheduled) {
    for (const std::size_t number : running_) {
      if (!is_in(now_, number)) later.push_back(number);
    }
  }
  std::vector<std::size_t> next;
  if (!batches_.empty()) next = batches_.front();
  std::erase_if(next, [&](std::size_t number) { return !is_in(running_, number); });
  const bool is_known = paths_->are_predicted(now_) && paths_->are_predicted(next);
  if (wants_forecast && is_known) tell(next);
  const bool is_asked = wants_forecast && !is_known;
  if (!is_asked && paths_->are_predicted(later)) return;
  auto work = [this, is_asked, later = std::move(later), next = std::move(next)] {
    if (is_asked) {
      predict(now_);
      predict(next);
      tell(next);
    }
    predict(later);
  };
  if (!task_) return work();
  task_->start(std::move(work));
}

void BatchOutlook::predict(std::span<const std::size_t> sequences) {
  if (paths_->are_predicted(sequences)) return;
  const double begin = clock_.now();
  stats_.sequences += paths_->predict(sequences);
  ++stats_.predictions;
  stats_.seconds += clock_.now() - begin;
}

void BatchOutlook::tell(std::span<const std::size_t> next) {
  PathForecast forecast{paths_->chances_of_any(now_), paths_->chances_of_any(next)};
  const std::lock_guard lock(mutex_);
  forecast_ = std::move(forecast);
}

std::optional<PathForecast> BatchOutlook::poll() {
  const std::lock_guard lock(mutex_);
  return std::exchange(forecast_, std::nullopt);
}

void BatchOutlook::finish_step(double seconds) {
  const double begin = clock_.now();
  if (task_) task_->wait();
  const double waited = clock_.now() - begin;
  stats_.waited_seconds += waited;
  round_seconds_ += seconds + waited;
  round_tokens_ += now_.size();
}

}  // namespace moerun
