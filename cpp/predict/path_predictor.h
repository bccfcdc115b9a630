// Tells from the tokens of a sequence which experts its last token will use, in all layers, before
// the first layer runs: a small causal transformer, trained on traces (docs/predictor.md).
//
// It runs on the host, a few tokens at a time: what attention needs of earlier tokens stays in a
// ring of `window` of them for each sequence. How tokens are grouped into calls changes no bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/host_memory.h"
#include "device/backend.h"
#include "predict/predictor_file.h"

namespace moerun {

class PathPredictor {
 public:
  // What the tokens of one sequence have left behind.
  class State {
   public:
    std::size_t num_tokens() const { return num_tokens_; }
    std::size_t bytes() const { return memory_.size(); }
    // Back to the start of a sequence.
    void clear() { num_tokens_ = 0; }

   private:
    friend class PathPredictor;
    State(const PathPredictor& owner, std::size_t bytes)
        : owner_(&owner), memory_(bytes, "the predictor's state of a sequence", PageSize::small) {}

    const PathPredictor* owner_;
    HostMemory memory_;  // keys and values: (blocks, 2, heads, window, head_dim) floats
    std::size_t num_tokens_ = 0;
  };

  // The next tokens of one sequence, at least one.
  struct Input {
    State* state = nullptr;
    std::span<const std::int32_t> new_tokens;
  };

  // As read_predictor(). `cpu` computes in host memory; it must outlive the predictor, and may be
  // the one that a model uses, as long as they take turns.
  static std::unique_ptr<PathPredictor> open(const std::filesystem::path& path,
                                             const ExpectedModel& expected, Backend& cpu);
  PathPredictor(const PathPredictor&) = delete;
  PathPredictor& operator=(const PathPredictor&) = delete;

  const PredictorShape& shape() const { return file_.shape; }
  const std::string& model() const { return file_.model; }
  const std::string& model_id() const { return file_.model_id; }
  // Of weights and scratch memory; states come on top, state_bytes() each.
  std::size_t memory_bytes() const;
  std::size_t state_bytes() const;

  // For this predictor only, which must outlive it. Throws OutOfMemory.
  State make_state() const;

  // Takes the next tokens of some sequences, each state once, and gives the probability of every
  // expert after each sequence's last token: (sequences, L, E). One pass over the weights serves
  // all of them. One call at a time. Throws InvalidArgument, with all states as they were.
  void predict(std::span<const Input> inputs, std::span<float> probabilities);
  // The same for one sequence, after each of its new tokens: (tokens, L, E).
  void predict_each(State& state, std::span<const std::int32_t> new_tokens,
                    std::span<float> probabilities);

 private:
  struct Row {
    State* state;
    std::size_t position;
    std::int32_t token_id;
    float* probabilities;  // null: nobody asks for them
  };

  PathPredictor(PredictorFile file, Backend& cpu);
  void append_rows(const Input& input);
  void run();
  void pass(std::span<const Row> rows);
  void attend(std::span<const Row> rows, std::size_t block);

  PredictorFile file_;
  Backend& cpu_;
  std::unique_ptr<Stream> stream_;
  std::vector<double> inv_freq_;  // (head_dim / 2)
  std::vector<Row> rows_;         // of the call
  std::vector<std::int32_t> token_ids_;
  std::vector<float> scores_;  // (window)

  std::unique_ptr<DeviceBuffer> memory_;  // of what follows, (rows of a pass, ...)
  Activations embedded_, hidden_, normed_, attended_, qkv_, wide_, logits_;
  Activations rotation_;  // cosines, then sines
};

}  // namespace moerun
