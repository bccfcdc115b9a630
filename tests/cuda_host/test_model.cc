// Whole models on the CUDA backend, run on the host: against the CPU, and bit by bit over budgets.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "host/device.h"
#include "host/host_backend.h"
#include "model/forward.h"
#include "model/generation.h"
#include "model/trace_routing.h"

namespace moerun::test {
namespace {

const std::string kModel = MOERUN_TEST_MODEL;

std::vector<std::int32_t> some_tokens(std::size_t count) {
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < count; ++i)
    ids.push_back(static_cast<std::int32_t>(37 * i % 4000 + 5));
  return ids;
}

ModelOptions on_device(const std::string& budget = "") {
  ModelOptions options;
  options.context_length = 64;
  options.threads = 1;
  options.make_backend = cuda_host::make_backend;
  options.experts.budget = budget;
  return options;
}

std::vector<float> logits_of(const ModelOptions& options, const std::vector<std::int32_t>& ids) {
  const auto model = Model::load(kModel, options);
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(model->config().vocab_size));
  forward(model, ids, logits);
  return logits;
}

struct Generated {
  std::vector<std::int32_t> ids;
  std::uint64_t hash = 0;  // of the last logits
};

Generated generate(const ModelOptions& options, std::size_t prompt, std::size_t count) {
  const auto model = Model::load(kModel, options);
  Generation generation(model, some_tokens(prompt), {{}, count, {}});
  Generated result;
  while (const auto token = generation.next()) result.ids.push_back(*token);
  result.hash = generation.stats().logits_hash;
  return result;
}

double relative_error(const std::vector<float>& found, const std::vector<float>& expected) {
  double difference = 0;
  double size = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += std::pow(found[i] - expected[i], 2);
    size += std::pow(expected[i], 2);
  }
  return std::sqrt(difference / size);
}

}  // namespace

TEST("logits of few tokens are those of the CPU") {
  ModelOptions cpu = on_device();
  cpu.make_backend = {};
  const auto ids = some_tokens(5);
  CHECK(relative_error(logits_of(on_device(), ids), logits_of(cpu, ids)) < 1e-4);
}

TEST("logits of many tokens are those of the CPU within bf16") {
  ModelOptions cpu = on_device();
  cpu.make_backend = {};
  const auto ids = some_tokens(20);
  CHECK(relative_error(logits_of(on_device(), ids), logits_of(cpu, ids)) < 1e-2);
}

TEST("greedy text is that of the CPU") {
  ModelOptions cpu = on_device();
  cpu.make_backend = {};
  CHECK(generate(on_device(), 6, 12).ids == generate(cpu, 6, 12).ids);
}

TEST("text keeps its bits for every budget, split, policy and prefetch setting") {
  const Generated expected = generate(on_device(), 10, 6);
  std::mt19937_64 random(1);
  const std::vector<std::string> budgets = {"8%", "25%", "60%"};
  const std::vector<std::string> policies = {"lru", "lfu", "lcp", "off"};
  for (int round = 0; round < 6; ++round) {
    cuda_host::set_order(round % 2 == 0 ? cuda_host::Order::late_copies : cuda_host::Order::random,
                         random());
    ModelOptions options = on_device(budgets[random() % budgets.size()]);
    options.experts.policy = policies[random() % policies.size()];
    if (options.experts.policy != "off") {
      options.experts.split = {static_cast<double>(random() % 5) / 4};
    }
    options.experts.prefetch = random() % 2 == 0 ? "on" : "off";
    const Generated found = generate(options, 10, 6);
    CHECK(found.ids == expected.ids);
    CHECK_EQ(found.hash, expected.hash);
  }
  cuda_host::set_order(cuda_host::Order::late_copies, 1);
}

TEST("predictions that are recorded on the device are those of the CPU") {
  RoutingRecordOptions options;
  options.with_prefetch = true;
  const auto prompt = some_tokens(6);
  ModelOptions on_cpu = on_device();
  on_cpu.make_backend = {};
  const auto cpu = Model::load(kModel, on_cpu);
  const RoutingRecord expected = trace_routing(cpu, prompt, options);
  const RoutingRecord decoded = trace_decoding(cpu, prompt, 4, {}, options);
  for (const std::string budget : {"", "40%"}) {  // with the predictions of the prefetcher between
    ModelOptions device = on_device(budget);
    if (!budget.empty()) device.experts.prefetch = "on";
    const auto model = Model::load(kModel, device);
    CHECK(trace_routing(model, prompt, options).prefetch_ids == expected.prefetch_ids);
    CHECK(trace_decoding(model, prompt, 4, {}, options).prefetch_ids == decoded.prefetch_ids);
  }
}

TEST("a copy engine that nobody waits for gives other text") {
  ModelOptions options = on_device("25%");
  options.experts.prefetch = "off";
  const Generated expected = generate(options, 10, 4);
  cuda_host::set_broken_waits(true);
  Generated broken;
  try {
    broken = generate(options, 10, 4);
  } catch (const Error&) {  // numbers that are none may be noticed, too
  }
  cuda_host::set_broken_waits(false);
  CHECK(broken.hash != expected.hash);
}

TEST("a model that does not fit on the device says how much it asked for") {
  struct Limit {
    explicit Limit(std::size_t bytes) { cuda_host::set_memory_limit(bytes); }
    ~Limit() { cuda_host::set_memory_limit(SIZE_MAX); }
  } const limit(cuda_host::bytes_allocated() + (4 << 20));
  CHECK_THROWS(OutOfMemory, Model::load(kModel, on_device()), "weights", "bytes were asked for");
}

}  // namespace moerun::test
