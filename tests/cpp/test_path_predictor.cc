// The routing-path predictor against a plain computation, over groupings of tokens, and on files
// that are damaged or of other models.
#include "predict/path_predictor.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "random_predictor.h"
#include "temp_folder.h"

namespace moerun {
namespace {

using test::RandomPredictor;
using test::TempFolder;

constexpr std::size_t kOutputs = 10;
constexpr std::size_t kHidden = 64;
constexpr std::size_t kWindow = 6;
constexpr std::size_t kHeads = 4;

std::vector<std::int32_t> some_tokens(std::size_t count, std::uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(random() % 11));
  return ids;
}

// In double, a token at a time, without any ring.
class PlainPredictor {
 public:
  explicit PlainPredictor(RandomPredictor& file) : file_(file) {}

  std::vector<double> after(const std::vector<std::int32_t>& ids) {
    using Rows = std::vector<std::vector<double>>;
    Rows x;
    for (const std::int32_t id : ids) {
      const auto& table = file_.tensor("embedding.weight").values;
      const auto* row = table.data() + static_cast<std::size_t>(id) * 32;
      x.push_back(product("embedding_projection.weight", std::vector<double>(row, row + 32)));
    }
    for (const std::string at : {"blocks.0.", "blocks.1."}) {
      Rows qkv;
      for (const auto& row : x) {
        qkv.push_back(product(at + "qkv.weight", norm(at + "attention_norm.weight", row)));
      }
      for (std::size_t t = 0; t < qkv.size(); ++t) rotate(qkv[t], t);
      for (std::size_t t = 0; t < x.size(); ++t) {
        add(x[t], product(at + "attention_output.weight", attend(qkv, t)));
        auto wide = product(at + "mlp_up.weight", norm(at + "mlp_norm.weight", x[t]));
        for (double& each : wide) each = each > 0 ? each * each : 0;
        add(x[t], product(at + "mlp_down.weight", wide));
      }
    }
    auto logits = product("head.weight", norm("final_norm.weight", x.back()));
    for (std::size_t i = 0; i < logits.size(); ++i) {
      logits[i] = 1 / (1 + std::exp(-logits[i] - file_.tensor("head.bias").values[i]));
    }
    return logits;
  }

 private:
  std::vector<double> product(const std::string& name, const std::vector<double>& x) {
    const auto& weights = file_.tensor(name);
    std::vector<double> y(weights.shape[0]);
    for (std::size_t r = 0; r < y.size(); ++r) {
      for (std::size_t c = 0; c < x.size(); ++c) y[r] += weights.values[r * x.size() + c] * x[c];
    }
    return y;
  }
  std::vector<double> norm(const std::string& name, const std::vector<double>& x) {
    double sum = 0;
    for (const double each : x) sum += each * each;
    const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + 1e-5);
    std::vector<double> y;
    for (std::size_t i = 0; i < x.size(); ++i) {
      y.push_back(x[i] * scale * file_.tensor(name).values[i]);
    }
    return y;
  }
  static void add(std::vector<double>& x, const std::vector<double>& y) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  // Queries and keys of all heads; a head's first half goes with its second.
  static void rotate(std::vector<double>& qkv, std::size_t position) {
    const std::size_t half = kHidden / kHeads / 2;
    for (std::size_t head = 0; head < 2 * kHeads; ++head) {
      for (std::size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) *
                             std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
        double& a = qkv[head * 2 * half + i];
        double& b = qkv[head * 2 * half + half + i];
        const std::pair rotated{a * std::cos(angle) - b * std::sin(angle),
                                b * std::cos(angle) + a * std::sin(angle)};
        std::tie(a, b) = rotated;
      }
    }
  }
  static std::vector<double> attend(const std::vector<std::vector<double>>& qkv, std::size_t t) {
    const std::size_t dim = kHidden / kHeads;
    const std::size_t first = t + 1 > kWindow ? t + 1 - kWindow : 0;
    std::vector<double> out(kHidden);
    for (std::size_t h = 0; h < kHeads; ++h) {
      std::vector<double> weights;
      double sum = 0;
      for (std::size_t s = first; s <= t; ++s) {
        double score = 0;
        for (std::size_t i = h * dim; i < (h + 1) * dim; ++i)
          score += qkv[t][i] * qkv[s][kHidden + i];
        weights.push_back(std::exp(score / std::sqrt(static_cast<double>(dim))));
        sum += weights.back();
      }
      for (std::size_t s = first; s <= t; ++s) {
        for (std::size_t i = h * dim; i < (h + 1) * dim; ++i) {
          out[i] += weights[s - first] / sum * qkv[s][2 * kHidden + i];
        }
      }
    }
    return out;
  }

  RandomPredictor& file_;
};

// A predictor in a file, opened.
struct Opened {
  explicit Opened(const RandomPredictor& file = RandomPredictor(), int threads = 1,
                  const ExpectedModel& expected = {})
      : cpu(make_cpu_backend(threads, "auto")),
        predictor(
            PathPredictor::open(folder.write("p.safetensors", file.bytes()), expected, *cpu)) {}

  std::vector<float> each(const std::vector<std::int32_t>& ids) {
    std::vector<float> all(ids.size() * kOutputs);
    PathPredictor::State state = predictor->make_state();
    predictor->predict_each(state, ids, all);
    return all;
  }

  TempFolder folder;
  std::unique_ptr<Backend> cpu;
  std::unique_ptr<PathPredictor> predictor;
};

std::vector<float> row(const std::vector<float>& all, std::size_t index) {
  const auto first = all.begin() + static_cast<std::ptrdiff_t>(index * kOutputs);
  return {first, first + kOutputs};
}

TEST("path predictor: probabilities are those of a plain computation, past the window too") {
  RandomPredictor file;
  Opened opened(file);
  CHECK_EQ(opened.predictor->shape().num_outputs(), kOutputs);
  CHECK(opened.predictor->shape().moe_layers == (std::vector<std::size_t>{1, 3}));
  const auto ids = some_tokens(20);
  const auto found = opened.each(ids);
  for (std::size_t t = 0; t < ids.size(); ++t) {
    const auto end = ids.begin() + static_cast<std::ptrdiff_t>(t) + 1;
    const auto expected = PlainPredictor(file).after({ids.begin(), end});
    for (std::size_t i = 0; i < kOutputs; ++i) {
      CHECK_NEAR(found[t * kOutputs + i], expected[i], 1e-5);
    }
  }
}

TEST("path predictor: how tokens are grouped into calls, and threads, change no bit") {
  const auto ids = some_tokens(300);  // more than a pass takes
  const auto expected = Opened().each(ids);
  for (const int threads : {1, 3}) {
    Opened opened(RandomPredictor(), threads);
    CHECK(opened.each(ids) == expected);
    for (const std::size_t step : {1u, 7u, 130u}) {
      PathPredictor::State state = opened.predictor->make_state();
      std::vector<float> last(kOutputs);
      for (std::size_t first = 0; first < ids.size(); first += step) {
        const std::size_t count = std::min(step, ids.size() - first);
        const PathPredictor::Input input{&state, std::span(ids).subspan(first, count)};
        opened.predictor->predict({&input, 1}, last);
        CHECK(last == row(expected, first + count - 1));
      }
      CHECK_EQ(state.num_tokens(), ids.size());
    }
  }
}

TEST("path predictor: sequences beside each other do not change each other") {
  Opened opened;
  std::vector<std::vector<std::int32_t>> ids;
  std::vector<std::vector<float>> expected;
  std::vector<PathPredictor::State> states;
  for (std::uint32_t s = 0; s < 5; ++s) {
    ids.push_back(some_tokens(40, s));
    expected.push_back(opened.each(ids.back()));
    states.push_back(opened.predictor->make_state());
  }
  std::mt19937 random(3);
  std::vector<float> out(5 * kOutputs);
  while (states[0].num_tokens() < 40) {
    std::vector<PathPredictor::Input> inputs;
    std::vector<std::size_t> chosen;
    for (std::size_t s = 0; s < states.size(); ++s) {
      const std::size_t done = states[s].num_tokens();
      const std::size_t count = std::min<std::size_t>(1 + random() % 9, 40 - done);
      if (count == 0) continue;
      inputs.push_back({&states[s], std::span(ids[s]).subspan(done, count)});
      chosen.push_back(s);
    }
    opened.predictor->predict(inputs, std::span(out).first(inputs.size() * kOutputs));
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      CHECK(row(out, i) == row(expected[chosen[i]], states[chosen[i]].num_tokens() - 1));
    }
  }
  states[0].clear();
  const PathPredictor::Input again{&states[0], std::span(ids[0]).first(3)};
  opened.predictor->predict({&again, 1}, std::span(out).first(kOutputs));
  CHECK(row(out, 0) == row(expected[0], 2));
}

TEST("path predictor: a refused call leaves every state as it was") {
  Opened opened;
  const auto ids = some_tokens(10);
  const auto expected = opened.each(ids);
  PathPredictor::State a = opened.predictor->make_state();
  PathPredictor::State b = opened.predictor->make_state();
  PathPredictor::State other = Opened().predictor->make_state();
  std::vector<float> out(2 * kOutputs);
  const std::span<const std::int32_t> first = std::span(ids).first(4);
  const std::vector<std::int32_t> outside = {1, 11}, negative = {-1};
  const auto refuses = [&](std::vector<PathPredictor::Input> inputs, const std::string& what) {
    CHECK_THROWS(InvalidArgument, opened.predictor->predict(inputs, out), what);
    CHECK_EQ(a.num_tokens() + b.num_tokens(), 0u);
  };
  refuses({{&a, first}, {&b, outside}}, "from 0 to 10, found 11");
  refuses({{&a, first}, {&b, negative}}, "found -1");
  refuses({{&a, first}, {&b, {}}}, "at least one new token");
  refuses({{&a, first}, {&a, first}}, "once");
  refuses({{&a, first}, {&other, first}}, "made itself");
  refuses({{&a, first}, {nullptr, first}}, "made itself");
  refuses({{&a, first}}, "room for 10 probabilities, found 20");
  const std::vector<PathPredictor::Input> inputs = {{&a, first}, {&b, ids}};
  opened.predictor->predict(inputs, out);
  CHECK(row(out, 0) == row(expected, 3));
  CHECK(row(out, 1) == row(expected, 9));
}

void refuses(const std::function<void(RandomPredictor&)>& spoil,
             const std::vector<std::string>& parts, const ExpectedModel& expected = {}) {
  RandomPredictor file;
  spoil(file);
  test::expect_throw<FormatError>(
      __FILE__, __LINE__, [&] { Opened opened(file, 1, expected); }, parts);
}

TEST("path predictor: files of other models are refused, and what differs is said") {
  const auto nothing = [](RandomPredictor&) {};
  const std::string again = "moe-predictor train";
  refuses(nothing, {"model_id is 0123456789abcdef, expected 1", "'some model'", again},
          {"1", "", 0, {}, 0, 0});
  refuses(nothing, {"tokenizer_hash is aaa", again}, {"", "b", 0, {}, 0, 0});
  refuses(nothing, {"vocab_size is 11, expected 12"}, {"", "", 12, {}, 0, 0});
  refuses(nothing, {"moe_layers is [1, 3], expected [1, 2]"}, {"", "", 0, {1, 2}, 0, 0});
  refuses(nothing, {"num_experts is 5, expected 6; top_k is 2, expected 3"}, {"", "", 0, {}, 6, 3});
  const ExpectedModel same{"0123456789abcdef", std::string(64, 'a'), 11, {1, 3}, 5, 2};
  CHECK_EQ(Opened(RandomPredictor(), 1, same).predictor->model_id(), same.model_id);
}

TEST("path predictor: metadata that are absurd are refused before memory is taken for them") {
  const auto with = [](const std::string& key, const std::string& value) {
    return [=](RandomPredictor& file) { file.metadata[key] = value; };
  };
  refuses(with("format", "moerun-trace"), {"metadata format", "'moerun-predictor'"});
  refuses(with("version", "2"), {"metadata version", "'1'", "found '2'"});
  refuses([](RandomPredictor& file) { file.metadata.erase("window"); }, {"window", "found none"});
  refuses(with("window", "0"), {"metadata window"});
  refuses(with("window", "4097"), {"metadata window", "to 4096"});
  refuses(with("vocab_size", "99999999999999999999"), {"metadata vocab_size"});
  refuses(with("vocab_size", "-1"), {"metadata vocab_size"});
  refuses(with("hidden_size", "48"), {"hidden_size", "multiple of 32"});
  refuses(with("hidden_size", "1e3"), {"hidden_size", "'1e3'"});
  refuses(with("num_heads", "3"), {"num_heads", "divisor"});
  refuses(with("num_heads", "0"), {"num_heads"});
  refuses(with("num_blocks", "1000000"), {"num_blocks"});
  refuses(with("top_k", "6"), {"top_k", "to 5"});
  refuses(with("num_experts", "65536"), {"num_experts"});
  refuses(with("moe_layers", "[]"), {"moe_layers"});
  refuses(with("moe_layers", "[3,1]"), {"moe_layers", "rising"});
  refuses(with("moe_layers", "[-1]"), {"moe_layers"});
  refuses(with("moe_layers", "[[[["), {"moe_layers"});
  refuses(with("model_id", "xyz"), {"model_id", "16 hexadecimal digits"});
  refuses(with("tokenizer_hash", ""), {"tokenizer_hash"});
  refuses(with("mlp_size", "128"), {"mlp_up.weight", "[96, 64]", "expected [128, 64]"});
}

TEST("path predictor: tensors that are missing, wrong, not finite or too many are refused") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  refuses([](RandomPredictor& file) { file.remove("blocks.1.qkv.weight"); },
          {"'blocks.1.qkv.weight'", "missing", "[192, 64]"});
  refuses([](RandomPredictor& file) { file.tensor("head.weight").dtype = "F16"; },
          {"'head.weight'", "found F16, expected BF16"});
  refuses([](RandomPredictor& file) { file.tensor("head.bias").dtype = "BF16"; },
          {"'head.bias'", "found BF16, expected F32"});
  refuses([](RandomPredictor& file) { file.tensor("head.weight").shape = {64, 10}; },
          {"'head.weight'", "[64, 10]", "expected [10, 64]"});
  refuses([=](RandomPredictor& file) { file.tensor("head.weight").values[3] = nan; },
          {"'head.weight'", "entry 3", "not a finite number"});
  refuses([=](RandomPredictor& file) { file.tensor("final_norm.weight").values[5] = infinity; },
          {"'final_norm.weight'", "entry 5", "not a finite number"});
  refuses([](RandomPredictor& file) { file.remove("trained_sequences"); }, {"trained_sequences"});
  refuses([](RandomPredictor& file) { file.tensor("trained_sequences").dtype = "F64"; },
          {"trained_sequences"});
  refuses(
      [](RandomPredictor& file) {
        file.tensors.emplace_back("head.scale", test::PredictorTensor{"F32", {1}, {1.0f}});
      },
      {"expected 17 tensors", "found 19"});
}

TEST("path predictor: files that are cut off are refused, wherever") {
  const TempFolder folder;
  const auto cpu = make_cpu_backend(1, "auto");
  const std::string whole = RandomPredictor().bytes();
  for (std::size_t size = 0; size < whole.size(); size += 1 + size / 3) {
    const auto path = folder.write("cut.safetensors", whole.substr(0, size));
    CHECK_THROWS(FormatError, PathPredictor::open(path, {}, *cpu), "cut.safetensors");
  }
  CHECK_THROWS(FileError, PathPredictor::open(folder.path() / "none", {}, *cpu), "none");
}

}  // namespace
}  // namespace moerun
