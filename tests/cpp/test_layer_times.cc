// Times of layers by hand, and of real passes.
#include "model/layer_times.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "check.h"
#include "model/generation.h"
#include "model/session.h"
#include "small_model.h"
#include "temp_folder.h"

namespace moerun::test {
namespace {

constexpr int kSequence = 0;
constexpr int kOther = 1;
const int kSequences[] = {kSequence, kOther};

// Two layers: 1 s of attention and 10 s of experts, of which 2 s wait.
void pass(LayerTimes& times, const int& sequence, std::size_t position, bool is_decoding,
          double begin) {
  times.begin(&sequence, position, is_decoding ? 1 : 5, is_decoding, begin);
  for (const double layer : {begin, begin + 11}) {
    times.note_routing(layer + 1);
    times.note_experts(layer + 11, 2);
  }
  times.end();
}

double sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

}  // namespace

TEST("layer times: experts without the waiting, tokens from begin to begin") {
  LayerTimes times(2);
  pass(times, kSequences[0], 0, false, 100);
  pass(times, kSequences[0], 5, true, 200);
  pass(times, kSequences[0], 6, true, 230);
  pass(times, kSequences[1], 7, true, 300);  // another sequence
  pass(times, kSequences[1], 9, true, 400);  // does not follow
  CHECK_EQ(times.prompts().size(), std::size_t{1});
  CHECK_EQ(times.prompts()[0].num_tokens, std::size_t{5});
  const auto tokens = times.tokens();
  CHECK_EQ(tokens.size(), std::size_t{4});
  for (const PassTimes& token : tokens) {
    CHECK(token.attention_s == std::vector<double>({1, 1}));
    CHECK(token.moe_s == std::vector<double>({8, 8}));
    CHECK(token.waited_s == std::vector<double>({2, 2}));
  }
  CHECK_EQ(tokens[0].token_s, 30.0);
  for (std::size_t i = 1; i < 4; ++i) CHECK(std::isnan(tokens[i].token_s));
}

TEST("layer times: what was not ended leaves nothing, and the oldest make room") {
  LayerTimes times(2);
  times.begin(&kSequences[0], 0, 1, true, 0);
  times.note_routing(1);
  times.end();  // one layer is missing
  times.begin(&kSequences[0], 0, 1, true, 0);
  CHECK(times.tokens().empty());
  for (std::size_t i = 0; i < LayerTimes::kMaxTokens + 7; ++i) {
    pass(times, kSequences[0], i, true, 100.0 * static_cast<double>(i));
    pass(times, kSequences[1], 0, false, 100.0 * static_cast<double>(i) + 50);
  }
  CHECK_EQ(times.tokens().size(), LayerTimes::kMaxTokens);
  CHECK_EQ(times.prompts().size(), LayerTimes::kMaxPrompts);
  CHECK(std::isnan(times.tokens().front().token_s));  // a prompt came in between
}

TEST("a model on the host notes the times of its layers with experts") {
  const TempFolder folder;
  const auto path = write_small_model(folder, {});
  ModelOptions options;
  options.experts.budget = "50%";
  options.experts.prefetch = "off";
  const auto model = Model::load(path, options);
  GenerationParams params;
  params.max_new_tokens = 9;
  Generation generation(model, {1, 2, 3, 4, 5}, params);
  while (generation.next()) {
  }
  const auto tokens = model->layer_times().tokens();
  CHECK_EQ(tokens.size(), std::size_t{8});
  double waited = 0;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    CHECK_EQ(tokens[i].attention_s.size(), std::size_t{2});
    for (const auto* list : {&tokens[i].attention_s, &tokens[i].moe_s, &tokens[i].waited_s}) {
      CHECK(std::all_of(list->begin(), list->end(), [](double s) { return s >= 0; }));
    }
    waited += sum(tokens[i].waited_s);
    const double layers =
        sum(tokens[i].attention_s) + sum(tokens[i].moe_s) + sum(tokens[i].waited_s);
    CHECK(i + 1 == tokens.size() ? std::isnan(tokens[i].token_s) : layers < tokens[i].token_s);
  }
  double stalled = 0;
  for (const auto& layer : model->expert_cache()->stats().layers) stalled += layer.stalled_seconds;
  CHECK_NEAR(waited, stalled, 1e-9);
  CHECK_EQ(model->layer_times().prompts().at(0).num_tokens, std::size_t{5});
}

TEST("transfers are measured, with the bytes and pieces of the store, and leave no trace") {
  const TempFolder folder;
  const auto path = write_small_model(folder, {});
  ModelOptions options;
  options.experts.budget = "50%";
  const auto model = Model::load(path, options);
  const CheckpointStore store(model->weights());
  for (const std::size_t first : {std::size_t{0}, std::size_t{32}}) {
    const std::vector<std::size_t> experts = {7, 0, 3};
    const TransferTiming timing = model->measure_transfers(1, experts, first, {});
    std::size_t pieces = 0;
    std::uint64_t bytes = 0;
    for (const std::size_t expert : experts) {
      const SegmentRead read{{1, expert}, first, 72 - first, {}};
      pieces += store.num_pieces(read);
      for (std::size_t i = 0; i < store.num_pieces(read); ++i) bytes += store.piece_bytes(read, i);
    }
    CHECK_EQ(timing.num_pieces, pieces);
    CHECK_EQ(timing.bytes, bytes);
    CHECK(timing.seconds > 0);
  }
  const std::vector<std::size_t> many = {0, 1, 2, 3};
  CHECK_THROWS(InvalidArgument, model->measure_transfers(1, many, 0, {}), "holds only 3");
  const std::vector<std::size_t> wrong = {10};
  CHECK_THROWS(InvalidArgument, model->measure_transfers(1, wrong, 0, {}), "0 to 9");
  CHECK_THROWS(InvalidArgument, model->measure_transfers(1, {}, 72, {}), "first_record");
  CHECK_THROWS(InvalidArgument, model->measure_transfers(0, {}, 0, {}), "no experts");
  const CacheStats stats = model->expert_cache()->stats();
  for (const auto& layer : stats.layers) CHECK_EQ(layer.lookups + layer.demand_bytes, 0u);
  CHECK_EQ(stats.link_bytes, 0u);
  const auto resident = Model::load(path, {});
  CHECK_THROWS(InvalidArgument, resident->measure_transfers(1, many, 0, {}), "expert_budget");
}

}  // namespace moerun::test
