#include "predict/path_predictor.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"

namespace moerun {
namespace {

constexpr std::size_t kMaxRows = 120;  // of a pass: what the kernels take at once
constexpr double kRopeTheta = 10000.0;
// The dot products below have this many partial sums, so that a compiler can keep them in vectors.
constexpr std::size_t kLanes = 8;

float dot(const float* a, const float* b, std::size_t n) {
  float sums[kLanes] = {};
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

void rotate(const float* head, const float* cosines, const float* sines, std::size_t half,
            float* out) {
  for (std::size_t i = 0; i < half; ++i) {
    out[i] = head[i] * cosines[i] - head[i + half] * sines[i];
    out[i + half] = head[i + half] * cosines[i] + head[i] * sines[i];
  }
}

}  // namespace

std::unique_ptr<PathPredictor> PathPredictor::open(const std::filesystem::path& path,
                                                   const ExpectedModel& expected, Backend& cpu) {
  if (!cpu.is_host()) {
    throw InvalidArgument(message("the routing-path predictor: expected a device that computes in ",
                                  "host memory, found ", cpu.name()));
  }
  return std::unique_ptr<PathPredictor>(
      new PathPredictor(read_predictor(path, expected, cpu), cpu));
}

PathPredictor::PathPredictor(PredictorFile file, Backend& cpu)
    : file_(std::move(file)), cpu_(cpu), stream_(cpu.make_stream()), scores_(file_.shape.window) {
  const PredictorShape& shape = file_.shape;
  const std::size_t half = shape.head_dim() / 2;
  for (std::size_t i = 0; i < half; ++i) {
    inv_freq_.push_back(std::pow(kRopeTheta, -static_cast<double>(i) / static_cast<double>(half)));
  }
  const std::pair<Activations*, std::size_t> parts[] = {
      {&embedded_, shape.embedding_size}, {&hidden_, shape.hidden_size},
      {&normed_, shape.hidden_size},      {&attended_, shape.hidden_size},
      {&qkv_, 3 * shape.hidden_size},     {&wide_, shape.mlp_size},
      {&logits_, shape.num_outputs()},    {&rotation_, 2 * half},
  };
  std::size_t floats = 0;
  for (const auto& [part, cols] : parts) floats += kMaxRows * padded(cols);
  memory_ =
      cpu.allocate(floats * sizeof(float), "the predictor's scratch memory", MemoryUse::streamed);
  float* next = memory_->as<float>();
  for (const auto& [part, cols] : parts) {
    *part = {next, kMaxRows, cols, padded(cols)};
    next += kMaxRows * padded(cols);
  }
}

std::size_t PathPredictor::memory_bytes() const {
  return file_.weights.memory->size() + memory_->size() + stream_->scratch_bytes();
}

std::size_t PathPredictor::state_bytes() const {
  const PredictorShape& shape = file_.shape;
  return shape.num_blocks * 2 * shape.window * shape.hidden_size * sizeof(float);
}

PathPredictor::State PathPredictor::make_state() const { return State(*this, state_bytes()); }

void PathPredictor::append_rows(const Input& input) {
  if (input.state == nullptr || input.state->owner_ != this) {
    throw InvalidArgument("the routing-path predictor: expected a state that it has made itself");
  }
  if (input.new_tokens.empty()) {
    throw InvalidArgument("the routing-path predictor: expected at least one new token a sequence");
  }
  std::size_t position = input.state->num_tokens_;
  for (const std::int32_t id : input.new_tokens) {
    if (id < 0 || static_cast<std::size_t>(id) >= file_.shape.vocab_size) {
      throw InvalidArgument(message("the routing-path predictor: expected token ids from 0 to ",
                                    file_.shape.vocab_size - 1, ", found ", id));
    }
    rows_.push_back({input.state, position++, id, nullptr});
  }
}

void PathPredictor::predict(std::span<const Input> inputs, std::span<float> probabilities) {
  const std::size_t outputs = file_.shape.num_outputs();
  if (probabilities.size() != inputs.size() * outputs) {
    throw InvalidArgument(message("the routing-path predictor: expected room for ",
                                  inputs.size() * outputs, " probabilities, found ",
                                  probabilities.size()));
  }
  rows_.clear();
  float* out = probabilities.data();
  for (const Input& input : inputs) {
    append_rows(input);
    rows_.back().probabilities = out;
    out += outputs;
  }
  std::vector<const State*> states;
  for (const Input& input : inputs) states.push_back(input.state);
  std::sort(states.begin(), states.end());
  if (std::adjacent_find(states.begin(), states.end()) != states.end()) {
    throw InvalidArgument("the routing-path predictor: expected every state once in a call");
  }
  run();
}

void PathPredictor::predict_each(State& state, std::span<const std::int32_t> new_tokens,
                                 std::span<float> probabilities) {
  const std::size_t outputs = file_.shape.num_outputs();
  if (probabilities.size() != new_tokens.size() * outputs) {
    throw InvalidArgument(message("the routing-path predictor: expected room for ",
                                  new_tokens.size() * outputs, " probabilities, found ",
                                  probabilities.size()));
  }
  rows_.clear();
  append_rows({&state, new_tokens});
  float* out = probabilities.data();
  for (Row& row : rows_) {
    row.probabilities = out;
    out += outputs;
  }
  run();
}

void PathPredictor::run() {
  for (std::size_t first = 0; first < rows_.size(); first += kMaxRows) {
    const std::size_t count = std::min(kMaxRows, rows_.size() - first);
    pass(std::span(rows_).subspan(first, count));
  }
  for (const Row& row : rows_) row.state->num_tokens_ = row.position + 1;
}

void PathPredictor::pass(std::span<const Row> rows) {
  const PredictorWeights& weights = file_.weights;
  const Activations embedded = embedded_.slice(0, rows.size());
  const Activations hidden = hidden_.slice(0, rows.size());
  const Activations normed = normed_.slice(0, rows.size());
  const Activations qkv = qkv_.slice(0, rows.size());
  const Activations wide = wide_.slice(0, rows.size());
  const LinearOutput add{1, /*accumulate=*/true};

  token_ids_.clear();
  for (const Row& row : rows) token_ids_.push_back(row.token_id);
  cpu_.embed(*stream_, weights.embedding, token_ids_, 1, embedded);
  cpu_.linear(*stream_, {weights.embedding_projection}, embedded, hidden, {});
  for (std::size_t r = 0; r < rows.size(); ++r) {
    float* cosines = rotation_.row(r);
    for (std::size_t i = 0; i < inv_freq_.size(); ++i) {
      const double angle = static_cast<double>(rows[r].position) * inv_freq_[i];
      cosines[i] = static_cast<float>(std::cos(angle));
      cosines[i + inv_freq_.size()] = static_cast<float>(std::sin(angle));
    }
  }
  for (std::size_t b = 0; b < weights.blocks.size(); ++b) {
    const PredictorBlock& block = weights.blocks[b];
    cpu_.norm(*stream_, block.attention_norm, hidden, normed);
    cpu_.linear(*stream_, {block.qkv}, normed, qkv, {});
    attend(rows, b);
    cpu_.linear(*stream_, {block.attention_output}, attended_.slice(0, rows.size()), hidden, add);
    cpu_.norm(*stream_, block.mlp_norm, hidden, normed);
    cpu_.linear(*stream_, {block.mlp_up}, normed, wide, {});
    for (std::size_t r = 0; r < rows.size(); ++r) {
      float* x = wide.row(r);
      for (std::size_t i = 0; i < wide.cols; ++i) {
        // (max(x, 0))^2, without a branch that every other number would miss.
        const float twice = x[i] + std::abs(x[i]);
        x[i] = 0.25f * twice * twice;
      }
    }
    cpu_.linear(*stream_, {block.mlp_down}, wide, hidden, add);
  }

  // The head is the widest product: only for the rows that are asked for.
  std::size_t asked = 0;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    if (rows[r].probabilities == nullptr) continue;
    if (asked != r) std::copy_n(hidden.row(r), hidden.pitch, hidden.row(asked));
    ++asked;
  }
  if (asked == 0) return;
  const Activations logits = logits_.slice(0, asked);
  cpu_.norm(*stream_, weights.final_norm, hidden.slice(0, asked), normed.slice(0, asked));
  cpu_.linear(*stream_, weights.head, normed.slice(0, asked), logits, {});
  std::size_t next = 0;
  bool is_finite = true;
  for (const Row& row : rows) {
    if (row.probabilities == nullptr) continue;
    const float* x = logits.row(next++);
    for (std::size_t i = 0; i < logits.cols; ++i) {
      row.probabilities[i] = 1.0f / (1.0f + std::exp(-x[i]));
      is_finite &= !std::isnan(row.probabilities[i]);
    }
  }
  if (!is_finite) {
    throw FormatError(message(file_.path, ": the predictor's weights give probabilities that are ",
                              "not numbers: they are too large; the file is damaged: copy or ",
                              "train it again"));
  }
}

// Row by row, for a token's key takes the place of one that the tokens before it still need.
void PathPredictor::attend(std::span<const Row> rows, std::size_t block) {
  const PredictorShape& shape = file_.shape;
  const std::size_t dim = shape.head_dim();
  const std::size_t half = dim / 2;
  const std::size_t ring = shape.window * shape.hidden_size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (std::size_t r = 0; r < rows.size(); ++r) {
    float* keys = rows[r].state->memory_.as<float>() + 2 * block * ring;
    float* values = keys + ring;
    const float* q = qkv_.row(r);
    const float* cosines = rotation_.row(r);
    const std::size_t slot = rows[r].position % shape.window;
    const std::size_t filled = std::min(rows[r].position + 1, shape.window);
    // Slots are gone through in the order in which they lie: it depends on the position alone.
    for (std::size_t h = 0; h < shape.num_heads; ++h) {
      float* head_keys = keys + h * shape.window * dim;
      float* head_values = values + h * shape.window * dim;
      float* out = attended_.row(r) + h * dim;
      const float* k = q + shape.hidden_size + h * dim;
      rotate(k, cosines, cosines + half, half, head_keys + slot * dim);
      std::copy_n(k + shape.hidden_size, dim, head_values + slot * dim);
      // The query is rotated in the place of the result, which it is read for before that.
      rotate(q + h * dim, cosines, cosines + half, half, out);
      float largest = -INFINITY;
      for (std::size_t s = 0; s < filled; ++s) {
        scores_[s] = scale * dot(out, head_keys + s * dim, dim);
        largest = std::max(largest, scores_[s]);
      }
      float sum = 0;
      for (std::size_t s = 0; s < filled; ++s) {
        scores_[s] = std::exp(scores_[s] - largest);
        sum += scores_[s];
      }
      for (std::size_t s = 0; s < filled; ++s) scores_[s] /= sum;
      for (std::size_t i = 0; i < dim; i += kLanes) {
        float sums[kLanes] = {};
        for (std::size_t s = 0; s < filled; ++s) {
          const float* value = head_values + s * dim + i;
          for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += scores_[s] * value[lane];
        }
        std::copy_n(sums, kLanes, out + i);
      }
    }
  }
}

}  // namespace moerun
