// Many sequences at once on the device, with and without an expert cache: the tokens that each has
// alone. (A card may round sums of few and of many tokens differently; these texts bear it.)
#include <map>

#include "check.h"
#include "model/batch_generation.h"
#include "small_model.h"
#include "test_prompt.h"

namespace moerun::test {

namespace {

BatchOptions batch_of(std::size_t size, const std::string& kv_budget = "") {
  BatchOptions options;
  options.batch_size = size;
  options.kv_budget = kv_budget;
  return options;
}

}  // namespace

TEST("sequences in a batch on the device have the tokens that they have alone") {
  const TempFolder folder;
  const auto path = write_small_model(folder, {});
  for (const std::string budget : {"", "70%"}) {
    ModelOptions options = on_device(budget);
    options.context_length = 32;
    options.prefill_chunk = 16;
    const auto model = Model::load(path, options);
    BatchGeneration batch(model, batch_of(2));
    GenerationParams params;
    params.max_new_tokens = 3;
    std::map<std::size_t, std::vector<std::int32_t>> alone;
    for (std::size_t length : {std::size_t{3}, std::size_t{18}, std::size_t{7}}) {
      std::vector<std::int32_t> prompt;
      for (std::size_t i = 0; i < length; ++i) {
        prompt.push_back(static_cast<std::int32_t>((7 * i + length) % 64));
      }
      auto& tokens = alone[batch.add(prompt, params)];
      Generation generation(model, prompt, params);
      while (const auto token = generation.next()) tokens.push_back(*token);
    }
    std::map<std::size_t, std::vector<std::int32_t>> found;
    for (auto step = batch.step(); !step.empty(); step = batch.step()) {
      for (const BatchToken& each : step) found[each.sequence].push_back(each.token_id);
    }
    CHECK(found == alone);
    CHECK_EQ(batch.stats().most_running, std::size_t{2});
  }
}

}  // namespace moerun::test
