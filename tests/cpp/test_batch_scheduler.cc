// Batches by predicted experts, without a model.
#include <algorithm>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "model/batch_scheduler.h"
#include "random_predictor.h"
#include "temp_folder.h"

namespace moerun::test {
namespace {

using Batches = std::vector<std::vector<std::size_t>>;

BatchScheduler make_scheduler(const TempFolder& folder, ScheduleMode mode) {
  const auto path = folder.write("p.safetensors", RandomPredictor().bytes());
  return BatchScheduler(path, {}, make_cpu_backend(2, "auto"), mode);
}

std::vector<std::size_t> numbers_up_to(std::size_t count) {
  std::vector<std::size_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), std::size_t{10});
  return numbers;
}

// Sequence 10 + i has the token i % 11.
void add_all(BatchScheduler& scheduler, const std::vector<std::size_t>& numbers) {
  for (const std::size_t number : numbers) {
    const auto token = static_cast<std::int32_t>((number - 10) % 11);
    const std::vector<std::int32_t> tokens(40, token);
    scheduler.add(number, tokens);
  }
}

}  // namespace

TEST("a scheduler leaves together what fits in one batch") {
  const TempFolder folder;
  BatchScheduler scheduler = make_scheduler(folder, ScheduleMode::on);
  const auto numbers = numbers_up_to(4);
  add_all(scheduler, numbers);
  CHECK(scheduler.divide(numbers, 4) == Batches{numbers});
  CHECK(scheduler.divide({}, 4) == Batches{{}});
  CHECK_EQ(scheduler.stats().rounds, std::uint64_t{0});
}

TEST("a scheduler divides what runs into two batches that cover it, never worse than in order") {
  const TempFolder folder;
  BatchScheduler scheduler = make_scheduler(folder, ScheduleMode::on);
  auto numbers = numbers_up_to(13);
  add_all(scheduler, numbers);
  for (int round = 0; round < 5; ++round) {
    const Batches batches = scheduler.divide(numbers, 8);
    CHECK_EQ(batches.size(), std::size_t{2});
    CHECK_EQ(batches[0].size(), (numbers.size() + 1) / 2);
    std::vector<std::size_t> all = batches[0];
    all.insert(all.end(), batches[1].begin(), batches[1].end());
    std::sort(all.begin(), all.end());
    CHECK(all == numbers);
    for (const std::size_t number : numbers) scheduler.append(number, round);
    scheduler.remove(numbers.back());
    numbers.pop_back();
  }
  const ScheduleStats stats = scheduler.stats();
  CHECK(stats.is_there && stats.is_active);
  CHECK_EQ(stats.scheduled_rounds, std::uint64_t{5});
  CHECK(stats.predicted_experts > 0 && stats.predicted_experts <= stats.predicted_in_order);
}

TEST("sequences with the same tokens share a batch") {
  const TempFolder folder;
  BatchScheduler scheduler = make_scheduler(folder, ScheduleMode::on);
  const auto numbers = numbers_up_to(8);
  for (const std::size_t number : numbers) {
    const std::vector<std::int32_t> tokens(9, number % 2 == 0 ? 1 : 7);
    scheduler.add(number, tokens);
  }
  const Batches batches = scheduler.divide(numbers, 4);
  for (const auto& batch : batches) {
    for (const std::size_t number : batch) CHECK_EQ(number % 2, batch.front() % 2);
  }
}

TEST("scheduling on trial goes back to the order of arrival where that is faster") {
  const TempFolder folder;
  BatchScheduler scheduler = make_scheduler(folder, ScheduleMode::automatic);
  const auto numbers = numbers_up_to(10);
  add_all(scheduler, numbers);
  const Batches in_order = {{10, 11, 12, 13, 14}, {15, 16, 17, 18, 19}};
  std::uint64_t scheduled = 0;
  for (int round = 0; round < 60; ++round) {
    const Batches batches = scheduler.divide(numbers, 5);
    const bool was_scheduled = scheduler.stats().scheduled_rounds != scheduled;
    scheduled = scheduler.stats().scheduled_rounds;
    CHECK(was_scheduled || batches == in_order);
    scheduler.record(was_scheduled ? 2.0 : 1.0);
  }
  const ScheduleStats stats = scheduler.stats();
  CHECK(!stats.is_active);
  CHECK_NEAR(stats.token_seconds_on, 2.0, 1e-9);
  CHECK_NEAR(stats.token_seconds_off, 1.0, 1e-9);
  CHECK(stats.rounds == 60 && stats.scheduled_rounds < 40);
}

TEST("names of schedules") {
  CHECK(schedule_mode_from("auto") == ScheduleMode::automatic);
  CHECK_THROWS(InvalidArgument, schedule_mode_from("always"), "on, off or auto", "always");
}

}  // namespace moerun::test
