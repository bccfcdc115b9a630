// Batches by predicted experts, without a model.
#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "model/batch_outlook.h"
#include "model/batch_scheduler.h"
#include "random_predictor.h"
#include "temp_folder.h"

namespace moerun::test {
namespace {

std::unique_ptr<SequencePaths> random_paths(const TempFolder& folder) {
  const auto path = folder.write("p.safetensors", RandomPredictor().bytes());
  return std::make_unique<SequencePaths>(path, ExpectedModel{}, make_cpu_backend(1, "auto"));
}

std::vector<std::size_t> numbers_up_to(std::size_t count) {
  std::vector<std::size_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), std::size_t{10});
  return numbers;
}

// Sequence 10 + i has the token i % 11.
void add_all(BatchOutlook& outlook, const std::vector<std::size_t>& numbers) {
  for (const std::size_t number : numbers) {
    const auto token = static_cast<std::int32_t>((number - 10) % 11);
    const std::vector<std::int32_t> tokens(40, token);
    outlook.add(number, tokens);
  }
}

}  // namespace

TEST("an outlook leaves together what fits in one batch") {
  const TempFolder folder;
  BatchOutlook outlook(random_paths(folder), ScheduleMode::on, /*in_background=*/true);
  const auto numbers = numbers_up_to(4);
  add_all(outlook, numbers);
  for (int step = 0; step < 3; ++step) {
    CHECK(outlook.next_batch(numbers, 4) == numbers);
    outlook.begin_step(/*wants_forecast=*/false);
    outlook.finish_step(0.1);
  }
  CHECK_EQ(outlook.schedule_stats().rounds, std::uint64_t{0});
  CHECK_EQ(outlook.stats().predictions, std::uint64_t{0});
}

TEST("rounds of two batches cover what runs, while sequences join and leave") {
  const TempFolder folder;
  BatchOutlook outlook(random_paths(folder), ScheduleMode::on, /*in_background=*/true);
  auto numbers = numbers_up_to(13);
  add_all(outlook, numbers);
  for (int round = 0; round < 12; ++round) {
    std::vector<std::size_t> all;
    while (all.size() < numbers.size()) {
      const auto batch = outlook.next_batch(numbers, 8);
      CHECK(!batch.empty() && batch.size() <= 8);
      all.insert(all.end(), batch.begin(), batch.end());
      outlook.begin_step(/*wants_forecast=*/false);
      outlook.finish_step(0.1);
      for (const std::size_t number : batch) outlook.append(number, round % 11);
    }
    std::sort(all.begin(), all.end());
    CHECK(all == numbers);
    outlook.remove(numbers[numbers.size() / 2]);
    numbers.erase(numbers.begin() + static_cast<std::ptrdiff_t>(numbers.size() / 2));
    if (round % 3 != 0) continue;
    numbers.push_back(100 + static_cast<std::size_t>(round));
    add_all(outlook, {numbers.back()});
  }
  const ScheduleStats stats = outlook.schedule_stats();
  CHECK(stats.is_there && stats.is_active && stats.scheduled_rounds > 4);
  CHECK(stats.predicted_experts > 0 && stats.predicted_experts <= stats.predicted_in_order);
}

TEST("sequences with the same tokens share a batch") {
  const TempFolder folder;
  BatchOutlook outlook(random_paths(folder), ScheduleMode::on, /*in_background=*/false);
  const auto numbers = numbers_up_to(8);
  for (const std::size_t number : numbers) {
    const std::vector<std::int32_t> tokens(9, number % 2 == 0 ? 1 : 7);
    outlook.add(number, tokens);
  }
  for (int step = 0; step < 2; ++step) {
    const auto batch = outlook.next_batch(numbers, 4);
    outlook.begin_step(/*wants_forecast=*/false);
    outlook.finish_step(0.1);
    for (const std::size_t number : batch) {
      CHECK_EQ(number % 2, batch.front() % 2);
      outlook.append(number, 3);
    }
  }
}

TEST("a forecast is of the step's batch and the next one, whichever thread makes it") {
  const TempFolder folder;
  const auto numbers = numbers_up_to(6);
  std::vector<std::vector<float>> told;
  for (const bool in_background : {false, true}) {
    BatchOutlook outlook(random_paths(folder), ScheduleMode::on, in_background);
    add_all(outlook, numbers);
    std::vector<std::size_t> seen;
    for (int step = 0; step < 2; ++step) {
      const auto batch = outlook.next_batch(numbers, 3);
      outlook.begin_step(/*wants_forecast=*/true);
      outlook.finish_step(0.1);
      const auto forecast = outlook.poll();
      CHECK(forecast.has_value() && !outlook.poll().has_value());
      CHECK_EQ(forecast->next.empty(), step == 1);
      auto paths = random_paths(folder);
      for (const std::size_t number : batch) {
        const std::vector<std::int32_t> tokens(40, static_cast<std::int32_t>((number - 10) % 11));
        paths->add(number, tokens);
      }
      paths->predict(batch);
      CHECK(paths->chances_of_any(batch) == forecast->now);
      told.push_back(forecast->now);
    }
  }
  CHECK(told[0] == told[2]);
}

TEST("scheduling on trial goes back to the order of arrival where that is faster") {
  const TempFolder folder;
  BatchOutlook outlook(random_paths(folder), ScheduleMode::automatic, /*in_background=*/true);
  const auto numbers = numbers_up_to(10);
  add_all(outlook, numbers);
  const std::vector<std::size_t> first = {10, 11, 12, 13, 14};
  for (int round = 0; round < 60; ++round) {
    const std::uint64_t before = outlook.schedule_stats().scheduled_rounds;
    auto batch = outlook.next_batch(numbers, 5);
    const bool is_scheduled = outlook.schedule_stats().scheduled_rounds != before;
    CHECK(is_scheduled || batch == first);
    for (int step = 0; step < (is_scheduled ? 2 : 1); ++step) {
      if (step != 0) batch = outlook.next_batch(numbers, 5);
      CHECK_EQ(batch.size(), std::size_t{5});
      outlook.begin_step(/*wants_forecast=*/false);
      outlook.finish_step(is_scheduled ? 2 : 1);
    }
  }
  const ScheduleStats stats = outlook.schedule_stats();
  CHECK(!stats.is_active);
  CHECK_NEAR(stats.token_seconds_on, 2.0 / 5, 0.01);
  CHECK_NEAR(stats.token_seconds_off, 1.0 / 5, 0.01);
  CHECK(stats.rounds == 60 && stats.scheduled_rounds < 40);
}

TEST("names of schedules") {
  CHECK(schedule_mode_from("auto") == ScheduleMode::automatic);
  CHECK_THROWS(InvalidArgument, schedule_mode_from("always"), "on, off or auto", "always");
}

}  // namespace moerun::test
