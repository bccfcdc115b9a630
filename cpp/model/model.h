// A loaded model: what Python, C and C++ callers hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "device/backend.h"
#include "model/decoder.h"
#include "model/sampler.h"
#include "model/workspace.h"
#include "weights/model_config.h"
#include "weights/model_weights.h"

namespace moerun {

struct ModelOptions {
  std::string device = "auto";       // auto, cpu, cuda
  int threads = 0;                   // 0: as many as there are usable processors
  std::int64_t context_length = 0;   // tokens; 0: what the model was made for
  std::int64_t prefill_chunk = 512;  // tokens that go through the layers together
  std::string cpu_kernels = "auto";
  DecoderOptions decoder;
};

struct LoadStats {
  double seconds = 0;
  std::uint64_t bytes = 0;  // read from files
};

// Of one generation, in seconds since it was started.
struct GenerationStats {
  std::size_t prompt_tokens = 0;
  std::size_t generated_tokens = 0;
  double prefill_seconds = 0;
  double ttft_seconds = 0;         // to the first token: prefill and sampling
  double decode_seconds = 0;       // of the tokens after the first
  std::uint64_t decode_bytes = 0;  // read for those
  std::uint64_t logits_hash = 0;   // FNV-1a of the last logits
  std::size_t kv_cache_bytes = 0;
  std::size_t scratch_bytes = 0;
};

// What a forward pass works in: a stream with its scratch memory, and the activations.
struct PassMemory {
  std::unique_ptr<Stream> stream;
  Workspace workspace;

  std::size_t bytes() const { return workspace.bytes() + stream->scratch_bytes(); }
};

// One model may be used from several threads; their steps take turns.
class Model {
 public:
  // `path`: a directory with config.json and safetensors. Throws FileError, FormatError,
  // UnsupportedModel, OutOfMemory, InvalidArgument, and what `progress` throws.
  static std::shared_ptr<Model> load(const std::filesystem::path& path, const ModelOptions& options,
                                     const LoadProgress& progress = {});

  const ModelConfig& config() const { return config_; }
  const ModelOptions& options() const { return options_; }
  std::size_t context_length() const { return context_length_; }
  int threads() const { return threads_; }
  const std::string& device() const { return device_; }
  const std::string& device_reason() const { return device_reason_; }
  const std::string& cpu_kernels() const { return cpu_kernels_; }
  const LoadStats& load_stats() const { return load_stats_; }
  std::size_t resident_bytes() const { return weights_->resident_bytes(); }
  std::size_t expert_bytes() const { return weights_->expert_bytes(); }
  // Of the generation that made progress last; none yet: nothing.
  std::optional<GenerationStats> generation_stats() const;

  void publish(const GenerationStats& stats);
  // Bytes of weights and KV cache that decoding one token reads, at a position.
  std::size_t decode_bytes(std::size_t position) const { return decoder_->decode_bytes(position); }

  // Throws InvalidArgument for an empty list, ids out of range, or more than the context holds.
  void check_prompt(std::span<const std::int32_t> token_ids) const;

 private:
  friend class Session;
  Model(ModelConfig config, const ModelOptions& options);

  // Memory of sessions that have ended serves the next: pages fresh from the system must be zeroed
  // first, which for a short prompt costs more than the prompt.
  std::unique_ptr<PassMemory> borrow_pass_memory();
  void return_pass_memory(std::unique_ptr<PassMemory> memory) noexcept;

  ModelConfig config_;
  ModelOptions options_;
  std::size_t context_length_ = 0;
  int threads_ = 1;
  std::string device_;
  std::string device_reason_;
  std::string cpu_kernels_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<ModelWeights> weights_;
  std::unique_ptr<Decoder> decoder_;
  LoadStats load_stats_;
  std::mutex step_mutex_;
  std::mutex memory_mutex_;
  std::unique_ptr<PassMemory> idle_memory_;
  mutable std::mutex stats_mutex_;
  std::optional<GenerationStats> generation_stats_;
};

}  // namespace moerun
