#include "model/model.h"

#include <algorithm>
#include <chrono>

#include "base/cpu_features.h"
#include "base/error.h"
#include "device/cpu/kernel_table.h"
#include "io/checkpoint.h"
#include "model/device_choice.h"

namespace moerun {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::int64_t kMaxPrefillChunk = 65536;

}  // namespace

Model::Model(ModelConfig config, const ModelOptions& options)
    : config_(std::move(config)), options_(options) {
  const auto trained = config_.max_position_embeddings;
  if (options.context_length < 0 || options.context_length > trained) {
    throw InvalidArgument(message("context_length: expected 1 to ", trained,
                                  " (the model's max_position_embeddings), found ",
                                  options.context_length));
  }
  context_length_ =
      static_cast<std::size_t>(options.context_length != 0 ? options.context_length : trained);
  if (options.threads < 0 || options.threads > kMaxThreads) {
    throw InvalidArgument(
        message("threads: expected 1 to ", kMaxThreads, ", found ", options.threads));
  }
  threads_ = options.threads != 0 ? options.threads : num_usable_cpus();
  if (options.prefill_chunk < 1 || options.prefill_chunk > kMaxPrefillChunk) {
    throw InvalidArgument(message("prefill_chunk: expected 1 to ", kMaxPrefillChunk, ", found ",
                                  options.prefill_chunk));
  }
  const DeviceChoice choice = choose_device(options.device);
  device_ = choice.device;
  device_reason_ = choice.reason;
  cpu_kernels_ = choose_cpu_kernels(options.cpu_kernels).name;
}

std::shared_ptr<Model> Model::load(const std::filesystem::path& path, const ModelOptions& options,
                                   const LoadProgress& progress) {
  const auto begin = std::chrono::steady_clock::now();
  ModelConfig config = load_model_config(path);
  if (!config.not_runnable.empty()) {
    throw UnsupportedModel(message(path.string(), ": ", config.not_runnable));
  }
  std::shared_ptr<Model> model(new Model(std::move(config), options));
  const Checkpoint checkpoint = Checkpoint::open(path);
  ThreadPool loaders(model->threads_);
  model->weights_ = std::make_unique<ModelWeights>(model->config_, checkpoint, loaders, progress);
  model->backend_ = make_cpu_backend(model->threads_, model->cpu_kernels_);
  model->decoder_ = std::make_unique<Decoder>(model->config_, *model->weights_, *model->backend_,
                                              options.decoder);
  const auto end = std::chrono::steady_clock::now();
  model->load_stats_ = {std::chrono::duration<double>(end - begin).count(),
                        model->weights_->bytes_read()};
  return model;
}

void Model::check_prompt(std::span<const std::int32_t> token_ids) const {
  if (token_ids.empty())
    throw InvalidArgument("token_ids: expected at least one token, found none");
  if (token_ids.size() > context_length_) {
    throw InvalidArgument(message("token_ids: the prompt has ", token_ids.size(),
                                  " tokens, but the context holds ", context_length_));
  }
  for (std::size_t i = 0; i < token_ids.size(); ++i) {
    if (token_ids[i] < 0 || token_ids[i] >= config_.vocab_size) {
      throw InvalidArgument(message("token_ids[", i, "]: expected 0 to ", config_.vocab_size - 1,
                                    ", found ", token_ids[i]));
    }
  }
}

std::unique_ptr<PassMemory> Model::borrow_pass_memory() {
  {
    const std::lock_guard lock(memory_mutex_);
    if (idle_memory_) return std::move(idle_memory_);
  }
  const auto max_tokens =
      std::min(static_cast<std::size_t>(options_.prefill_chunk), context_length_);
  return std::make_unique<PassMemory>(
      PassMemory{backend_->make_stream(), Workspace(config_, max_tokens)});
}

void Model::return_pass_memory(std::unique_ptr<PassMemory> memory) noexcept {
  const std::lock_guard lock(memory_mutex_);
  idle_memory_ = std::move(memory);  // of two that end, one is enough
}

std::optional<GenerationStats> Model::generation_stats() const {
  const std::lock_guard lock(stats_mutex_);
  return generation_stats_;
}

void Model::publish(const GenerationStats& stats) {
  const std::lock_guard lock(stats_mutex_);
  generation_stats_ = stats;
}

}  // namespace moerun
