// What live and simulated batches share.
#include <cstdint>
#include <vector>

#include "check.h"
#include "model/batch_steps.h"
#include "predict/next_layer_router.h"

namespace moerun::test {
namespace {

// The tokens of each piece, of each pass.
std::vector<std::vector<std::size_t>> sizes_of(
    const std::vector<std::vector<PromptPiece>>& passes) {
  std::vector<std::vector<std::size_t>> sizes;
  for (const auto& pass : passes) {
    sizes.emplace_back();
    for (const PromptPiece& piece : pass) sizes.back().push_back(piece.num_tokens);
  }
  return sizes;
}

}  // namespace

TEST("prompts are cut where a pass is full, one after the other") {
  using Sizes = std::vector<std::vector<std::size_t>>;
  const std::size_t lengths[] = {3, 9, 0, 2, 4};
  const auto passes = prompt_passes(lengths, 5);
  CHECK(sizes_of(passes) == (Sizes{{3, 2}, {5}, {2, 2, 1}, {3}}));
  std::vector<std::size_t> ended;
  for (const auto& pass : passes) {
    for (const PromptPiece& piece : pass) {
      if (piece.is_last) ended.push_back(piece.prompt);
    }
  }
  CHECK(ended == (std::vector<std::size_t>{0, 1, 3, 4}));
  CHECK(sizes_of(prompt_passes(lengths, 18)) == (Sizes{{3, 9, 2, 4}}));
  CHECK(prompt_passes({}, 5).empty());
}

TEST("scheduling takes twice as many sequences") {
  CHECK_EQ(batch_capacity(3, ScheduleMode::off), std::size_t{3});
  CHECK_EQ(batch_capacity(3, ScheduleMode::on), std::size_t{6});
  CHECK_EQ(batch_capacity(3, ScheduleMode::automatic), std::size_t{6});
}

TEST("without an outlook all that run decode") {
  const std::size_t running[] = {4, 7, 9};
  CHECK(choose_batch(nullptr, nullptr, running, 2) == (std::vector<std::size_t>{4, 7, 9}));
}

TEST("experts that most tokens name come first, then those with the better rank") {
  const std::int32_t ids[] = {5, 1, 2, /**/ 3, 2, 1, /**/ 0, 4, 2};
  CHECK(named_by_all(ids, 3, 6) == (std::vector<std::size_t>{2, 1, 5, 3, 0, 4}));
  CHECK(named_by_all({ids, 3}, 3, 6) == (std::vector<std::size_t>{5, 1, 2}));
  CHECK(named_by_all({}, 3, 6).empty());
}

}  // namespace moerun::test
