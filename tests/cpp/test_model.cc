// The shipped model through the C++ and C interfaces.
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "capi/moerun.h"
#include "check.h"
#include "model/forward.h"
#include "model/generation.h"
#include "model/model.h"
#include "model/session.h"

namespace moerun::test {
namespace {

const char* const kModel = MOERUN_TEST_MODEL;

std::vector<std::int32_t> some_tokens(std::size_t count) {
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(i * 37 % 4096));
  return ids;
}

std::vector<float> logits_of(const ModelOptions& options, const std::vector<std::int32_t>& ids) {
  const auto model = Model::load(kModel, options);
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(model->config().vocab_size));
  forward(model, ids, logits);
  return logits;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST("logits have the same bits for any threads, segments and prefill chunks") {
  const auto ids = some_tokens(70);
  ModelOptions options;
  options.threads = 1;
  const auto reference = logits_of(options, ids);
  for (const int threads : {2, 3, 4}) {
    options.threads = threads;
    options.decoder.segment_records = threads == 3 ? 32 : 0;
    options.prefill_chunk = threads == 4 ? 1 : 7 * threads;
    CHECK(same_bits(reference, logits_of(options, ids)));
  }
}

TEST("decoding token by token gives the bits of one long prefill") {
  const auto model = Model::load(kModel, {});
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  Generation generation(model, some_tokens(5), {{}, 20, {}});
  auto ids = some_tokens(5);
  while (const auto token = generation.next()) ids.push_back(*token);
  CHECK_EQ(ids.size(), std::size_t{25});
  std::vector<float> logits(ids.size() * vocab);
  forward(model, ids, logits);
  for (std::size_t t = 4; t + 1 < ids.size(); ++t) {
    Sampler greedy({}, vocab);
    CHECK_EQ(greedy.sample({logits.data() + t * vocab, vocab}), ids[t + 1]);
  }
}

TEST("an interruption between layers ends a generation and leaves the model usable") {
  const auto model = Model::load(kModel, {});
  Generation generation(model, some_tokens(5), {{}, 20, {}});
  CHECK(generation.next().has_value());
  CHECK_THROWS(Interrupted, generation.next([] { throw Interrupted("stop"); }), "stop");
  CHECK(!generation.next().has_value());
  CHECK(Generation(model, some_tokens(3), {{}, 1, {}}).next().has_value());
}

TEST("a sequence goes on after an interruption with the bits of an undisturbed one") {
  const auto model = Model::load(kModel, {});
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  const auto ids = some_tokens(12);
  std::vector<float> expected(vocab);
  Session(model).append(ids, expected, {});
  Session session(model);
  std::vector<float> logits(vocab);
  session.append(std::span(ids).first(9), logits, {});
  int calls = 0;
  const Checkpointer stop = [&] {
    if (++calls == 2) throw Interrupted("stop");
  };
  CHECK_THROWS(Interrupted, session.append(std::span(ids).subspan(9), logits, stop), "stop");
  CHECK_EQ(session.num_tokens(), std::size_t{9});
  session.append(std::span(ids).subspan(9), logits, {});
  CHECK(same_bits(logits, expected));
}

TEST("a generation ends when the context is full") {
  ModelOptions options;
  options.context_length = 8;
  const auto model = Model::load(kModel, options);
  Generation generation(model, some_tokens(5), {{}, 100, {}});
  std::size_t count = 0;
  while (generation.next()) ++count;
  CHECK_EQ(count, std::size_t{4});  // positions 5, 6, 7, and one that is never fed back
}

TEST("prompts that cannot be run are refused with both numbers") {
  ModelOptions options;
  options.context_length = 8;
  const auto model = Model::load(kModel, options);
  CHECK_THROWS(InvalidArgument, model->check_prompt({}), "at least one");
  CHECK_THROWS(InvalidArgument, model->check_prompt(some_tokens(9)), "9", "8");
  const std::vector<std::int32_t> high = {1, 4096};
  CHECK_THROWS(InvalidArgument, model->check_prompt(high), "token_ids[1]", "4095", "4096");
  const std::vector<std::int32_t> negative = {-1};
  CHECK_THROWS(InvalidArgument, model->check_prompt(negative), "token_ids[0]", "-1");
}

TEST("options out of range are refused by name") {
  const auto load = [](auto change) {
    ModelOptions options;
    change(options);
    return Model::load(kModel, options);
  };
  CHECK_THROWS(InvalidArgument, load([](auto& o) { o.threads = -1; }), "threads");
  CHECK_THROWS(InvalidArgument, load([](auto& o) { o.context_length = 2000; }), "context_length",
               "1024", "2000");
  CHECK_THROWS(InvalidArgument, load([](auto& o) { o.prefill_chunk = 0; }), "prefill_chunk");
  CHECK_THROWS(InvalidArgument, load([](auto& o) { o.device = "tpu"; }), "tpu", "cuda");
  CHECK_THROWS(InvalidArgument, load([](auto& o) { o.decoder.segment_records = 33; }),
               "segment_records");
}

TEST("the progress of loading is told to the end, and may stop it") {
  std::uint64_t last = 0;
  std::uint64_t total = 0;
  Model::load(kModel, {}, [&](std::uint64_t done, std::uint64_t all) {
    CHECK(done >= last && done <= all);
    last = done;
    total = all;
  });
  CHECK(total > 20'000'000 && last == total);
  CHECK_THROWS(Interrupted, Model::load(kModel, {}, [](auto, auto) { throw Interrupted("no"); }),
               "no");
}

TEST("the C interface gives the same logits and tokens as the C++ one") {
  const auto ids = some_tokens(9);
  moerun_model* model = nullptr;
  CHECK_EQ(moerun_open(kModel, nullptr, &model), MOERUN_OK);
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(moerun_vocab_size(model)));
  CHECK_EQ(moerun_forward(model, ids.data(), ids.size(), logits.data(), logits.size()), MOERUN_OK);
  CHECK(same_bits(logits, logits_of({}, ids)));

  moerun_sampling sampling;
  CHECK_EQ(moerun_sampling_default(&sampling, sizeof(sampling)), MOERUN_OK);
  sampling.max_new_tokens = 6;
  moerun_generation* generation = nullptr;
  CHECK_EQ(moerun_generate(model, ids.data(), ids.size(), &sampling, &generation), MOERUN_OK);
  Generation expected(Model::load(kModel, {}), ids, {{}, 6, {0}});
  for (std::int32_t token = 0; moerun_generation_next(generation, &token) == MOERUN_OK;) {
    CHECK_EQ(token, expected.next().value());
  }
  moerun_close(model);  // before the generation: it keeps what it needs
  std::int32_t token = 0;
  CHECK_EQ(moerun_generation_next(generation, &token), MOERUN_END);
  moerun_generation_close(generation);
}

TEST("the C interface reports errors by status and text and never throws") {
  moerun_model* model = nullptr;
  CHECK_EQ(moerun_open("/nowhere/at/all", nullptr, &model), MOERUN_FILE_ERROR);
  CHECK(std::string(moerun_last_error()).find("/nowhere/at/all") != std::string::npos);
  CHECK(model == nullptr);
  CHECK_EQ(moerun_open(nullptr, nullptr, &model), MOERUN_INVALID_ARGUMENT);
  CHECK_EQ(moerun_open(kModel, nullptr, nullptr), MOERUN_INVALID_ARGUMENT);
  moerun_options options;
  CHECK_EQ(moerun_options_default(&options, sizeof(options) + 8), MOERUN_INVALID_ARGUMENT);
  CHECK_EQ(moerun_options_default(&options, sizeof(options)), MOERUN_OK);
  CHECK_EQ(moerun_open(kModel, &options, &model), MOERUN_OK);
  CHECK_EQ(std::string(moerun_last_error()), std::string());
  float logit = 0;
  const std::int32_t id = 3;
  CHECK_EQ(moerun_forward(model, &id, 1, &logit, 1), MOERUN_INVALID_ARGUMENT);
  CHECK_EQ(moerun_forward(model, &id, 0, &logit, 1), MOERUN_INVALID_ARGUMENT);
  moerun_generation* generation = nullptr;
  for (const std::size_t wild : {std::size_t{1} << 30, std::size_t{1} << 61, SIZE_MAX}) {
    CHECK_EQ(moerun_forward(model, &id, wild, &logit, 1), MOERUN_INVALID_ARGUMENT);
    CHECK_EQ(moerun_generate(model, &id, wild, nullptr, &generation), MOERUN_INVALID_ARGUMENT);
    moerun_sampling sampling;
    CHECK_EQ(moerun_sampling_default(&sampling, sizeof(sampling)), MOERUN_OK);
    sampling.stop_token_ids = &id;
    sampling.num_stop_token_ids = wild;
    CHECK_EQ(moerun_generate(model, &id, 1, &sampling, &generation), MOERUN_INVALID_ARGUMENT);
    CHECK(generation == nullptr);
  }
  std::size_t length = 0;
  CHECK_EQ(moerun_stats_json(model, nullptr, 0, &length), MOERUN_OK);
  std::string text(length + 1, ' ');
  CHECK_EQ(moerun_stats_json(model, text.data(), text.size(), &length), MOERUN_OK);
  CHECK(text.find("\"resident_bytes\"") != std::string::npos);
  moerun_close(model);
  moerun_close(nullptr);
  moerun_generation_close(nullptr);
}

}  // namespace moerun::test
