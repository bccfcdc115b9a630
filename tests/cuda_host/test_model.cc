// Whole models on the CUDA backend: against the CPU, and bit by bit over budgets.
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <regex>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "model/forward.h"
#include "model/generation.h"
#include "model/session.h"
#include "model/trace_routing.h"
#include "on_device.h"
#include "random_weights.h"
#include "temp_folder.h"
#include "test_prompt.h"

namespace moerun::test {
namespace {

std::vector<float> logits_of(const ModelOptions& options, const std::vector<std::int32_t>& ids,
                             const std::string& path = kModel) {
  const auto model = Model::load(path, options);
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(model->config().vocab_size));
  forward(model, ids, logits);
  return logits;
}

std::uint16_t nearest_half(float value) {
  if (std::fabs(value) >= 0x1p-14f) return exact_half(value);  // it was bf16
  const auto bits = static_cast<std::uint16_t>(std::lround(std::fabs(value) * 0x1p24f));
  return static_cast<std::uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

// The model with weights of another dtype.
void write_model(const TempFolder& folder, DType dtype) {
  const auto read = [](const std::string& name) {
    std::ifstream file(kModel + "/" + name, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  folder.write("config.json", read("config.json"));
  const std::string bytes = read("model.safetensors");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  const std::string header = bytes.substr(8, length);
  // The dtype changes in the header, and the places of tensors with it.
  const std::regex changes("\"BF16\"|\"data_offsets\":\\[(\\d+),(\\d+)\\]");
  std::string changed;
  std::size_t done = 0;
  for (auto it = std::sregex_iterator(header.begin(), header.end(), changes);
       it != std::sregex_iterator(); ++it) {
    changed += header.substr(done, static_cast<std::size_t>(it->position()) - done);
    done = static_cast<std::size_t>(it->position() + it->length());
    const auto offset = [&](std::size_t group) {
      return std::to_string(std::stoull((*it)[group]) * size_of(dtype) / 2);
    };
    changed += (*it)[1].matched ? "\"data_offsets\":[" + offset(1) + "," + offset(2) + "]"
                                : "\"" + std::string(name_of(dtype)) + "\"";
  }
  changed += header.substr(done);
  const std::size_t count = (bytes.size() - 8 - length) / 2;
  std::string data(count * size_of(dtype), '\0');
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + 8 + length + i * 2, sizeof(bits));
    const float value = bf16_to_float(bits);
    const std::uint16_t half = nearest_half(value);
    char* target = data.data() + i * size_of(dtype);
    std::memcpy(target, dtype == DType::f16 ? static_cast<const void*>(&half) : &value,
                size_of(dtype));
  }
  folder.write("model.safetensors", safetensors_bytes(changed, data));
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

TEST("logits of many tokens in F16 and F32 are those of the CPU within tf32 and float32") {
  ModelOptions cpu = on_device();
  cpu.make_backend = {};
  const auto ids = some_tokens(12);
  for (const DType dtype : {DType::f16, DType::f32}) {
    const TempFolder folder;
    write_model(folder, dtype);
    const auto expected = logits_of(cpu, ids, folder.path());
    const auto found = logits_of(on_device(), ids, folder.path());
    CHECK_NEAR(relative_error(found, expected), 0, dtype == DType::f16 ? 2e-3 : 1e-5);
  }
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
  for (int round = 0; round < 4; ++round) {
    set_order(round % 2 == 0 ? Order::late_copies : Order::random, random());
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
  set_order(Order::late_copies, 1);
}

TEST("a weight that is no number is refused on the device, by its name") {
  const TempFolder folder;
  const auto read = [](const std::string& name) {
    std::ifstream file(kModel + "/" + name, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  folder.write("config.json", read("config.json"));
  const std::string bytes = read("model.safetensors");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  for (const std::string name : {"model.layers.1.mlp.gate.weight",
                                 "model.layers.2.self_attn.k_proj.weight", "model.norm.weight"}) {
    const std::regex place("\"" + name + "\":\\{[^}]*\"data_offsets\":\\[(\\d+),");
    std::smatch found;
    const std::string header = bytes.substr(8, length);
    CHECK(std::regex_search(header, found, place));
    std::string damaged = bytes;
    const std::uint16_t nan = 0x7fc0;  // BF16
    std::memcpy(damaged.data() + 8 + length + std::stoull(found[1]) + 6, &nan, sizeof(nan));
    folder.write("model.safetensors", damaged);
    for (const std::string budget : {"", "40%"}) {
      const auto model = Model::load(folder.path(), on_device(budget));
      const auto prompt = some_tokens(4);
      std::vector<float> logits(prompt.size() *
                                static_cast<std::size_t>(model->config().vocab_size));
      CHECK_THROWS(FormatError, forward(model, prompt, logits), "'" + name + "'", "NaN");
      Generation generation(model, prompt, {{}, 4, {}});
      CHECK_THROWS(FormatError, generation.next(), "'" + name + "'", "NaN");
      if (name == "model.norm.weight") continue;  // no routing comes from it
      CHECK_THROWS(FormatError, trace_routing(model, prompt, {}), "'" + name + "'", "NaN");
    }
  }
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

TEST("an interrupted sequence leaves nothing under way that another one could meet") {
  ModelOptions options = on_device("60%");
  options.experts.prefetch = "on";
  const auto model = Model::load(kModel, options);
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  const auto prompt = some_tokens(3);
  const auto decode = [&](Session& session, std::int32_t token, const Checkpointer& checkpointer) {
    std::vector<float> logits(vocab);
    session.append({&token, 1}, logits, checkpointer);
    return logits;
  };
  std::vector<std::vector<float>> expected;
  {
    Session alone(model);
    alone.append(prompt, {}, {});
    for (std::int32_t i = 0; i < 6; ++i) expected.push_back(decode(alone, 700 + 31 * i, {}));
  }
  Session other(model);
  other.append(prompt, {}, {});
  for (std::int32_t i = 0; i < 6; ++i) {
    Session interrupted(model);
    interrupted.append(prompt, {}, {});
    int calls = 0;
    const Checkpointer stop = [&] {
      if (++calls == 4 + i % 4) throw Interrupted("stop");
    };
    CHECK_THROWS(Interrupted, (decode(interrupted, 700 + 31 * i, stop), 0), "stop");
    CHECK(decode(other, 700 + 31 * i, {}) == expected[static_cast<std::size_t>(i)]);
  }
}

#if defined(MOERUN_CUDA_HOST)
TEST("a copy engine that nobody waits for gives other text") {
  ModelOptions options = on_device("25%");
  options.experts.prefetch = "off";
  const Generated expected = generate(options, 10, 4);
  cuda_host::forget_waits(UINT64_MAX);
  Generated broken;
  try {
    broken = generate(options, 10, 4);
  } catch (const Error&) {  // numbers that are none may be noticed, too
  }
  cuda_host::forget_waits(0);
  CHECK(broken.hash != expected.hash);
}
#endif

}  // namespace moerun::test
