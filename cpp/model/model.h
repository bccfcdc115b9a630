// A loaded model: what Python, C and C++ callers hold.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/fork.h"
#include "base/thread_pool.h"
#include "device/backend.h"
#include "expert/expert_cache.h"
#include "expert/expert_store.h"
#include "io/checkpoint.h"
#include "model/batch_stats.h"
#include "model/decoder.h"
#include "model/device_choice.h"
#include "model/memory_plan.h"
#include "model/sampler.h"
#include "model/workspace.h"
#include "trace/event_log.h"
#include "weights/model_config.h"
#include "weights/model_weights.h"

namespace moerun {

struct ModelOptions {
  std::string device = "auto";       // auto, cpu, cuda
  int threads = 0;                   // 0: as many as there are usable processors
  std::int64_t context_length = 0;   // tokens; 0: what the model was made for
  std::int64_t prefill_chunk = 512;  // tokens that go through the layers together
  std::string cpu_kernels = "auto";
  ExpertCacheOptions experts;
  DecoderOptions decoder;
  // In place of the device's own backend: for tests of a backend that no device name stands for.
  std::function<std::unique_ptr<Backend>()> make_backend;
};

struct LoadStats {
  double seconds = 0;
  std::uint64_t bytes = 0;         // read from files
  std::vector<std::string> notes;  // what a user should hear of
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

// Everything about a model that can be known before its weights are read.
struct ModelPlan {
  DeviceChoice device;
  std::string cpu_kernels;
  int threads = 1;
  std::unique_ptr<Backend> backend;  // outlives what lies in its memory
  ModelConfig config;
  std::size_t context_length = 0;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<ModelWeights> weights;
  MemoryPlan memory;
  std::optional<HostPlan> host;  // of a device that copies experts from the host

  const CacheLayout& layout() const { return memory.layout; }
};

// Asks the device how much of its memory is free, and takes none. Throws what Model::load throws.
ModelPlan plan_model(const std::filesystem::path& path, const ModelOptions& options);

// One model may be used from several threads; their steps take turns.
class Model {
 public:
  ~Model();
  // `path`: a directory with config.json and safetensors. Throws FileError, FormatError,
  // UnsupportedModel, OutOfMemory, InvalidArgument, DeviceError, and what `progress` throws.
  static std::shared_ptr<Model> load(const std::filesystem::path& path, const ModelOptions& options,
                                     const LoadProgress& progress = {});

  const ModelConfig& config() const { return plan_.config; }
  const ModelOptions& options() const { return options_; }
  std::size_t context_length() const { return plan_.context_length; }
  int threads() const { return plan_.threads; }
  ThreadUse thread_use() const { return plan_.backend->thread_use(); }
  const std::string& device() const { return plan_.device.device; }
  const std::string& device_reason() const { return plan_.device.reason; }
  const std::string& cpu_kernels() const { return plan_.cpu_kernels; }
  const LoadStats& load_stats() const { return load_stats_; }
  std::size_t resident_bytes() const { return plan_.weights->resident_bytes(); }
  std::size_t expert_bytes() const {
    return plan_.weights->expert_bytes();
  }  // of all, in memory or not
  // Memory that holds experts.
  std::size_t expert_memory_bytes() const {
    return cache_ ? cache_->arena_bytes() : expert_bytes();
  }
  const ModelWeights& weights() const { return *plan_.weights; }
  // As it is now; see reconfigure().
  CacheLayout cache_layout() const { return cache_ ? cache_->layout() : plan_.layout(); }
  // Null where no device copies experts from the host.
  const HostPlan* host_plan() const { return host_ ? &host_->plan : nullptr; }
  // Null where every expert is resident.
  const ExpertCache* expert_cache() const { return cache_.get(); }
  // Gives the cache the slots and splits of another plan, between two tokens. `plan`: the path of a
  // file, or with `plan_text` what to call that text in messages. Throws what reading a plan
  // throws, InvalidArgument where there is no cache, and what ExpertCache::reconfigure throws.
  Reconfiguration reconfigure(const std::string& plan, const std::string& plan_text,
                              const Checkpointer& while_waiting = {});
  // What the cache did so far, if that was asked for (ExpertCacheOptions::log_events).
  std::vector<CacheEvent> cache_events() const { return events_.copy(); }
  // The same since it was last called, which is then kept no longer.
  std::vector<CacheEvent> take_cache_events() { return events_.take(); }
  // Of the generation that made progress last; none yet: nothing.
  std::optional<GenerationStats> generation_stats() const;
  std::optional<BatchStats> batch_stats() const;  // and of the batch

  const ActiveExpertCounts& active_counts() const { return decoder_->active_counts(); }
  // Of the last passes; see Decoder::layer_times.
  const LayerTimes& layer_times() const { return decoder_->layer_times(); }
  // See ExpertCache::measure_transfers. InvalidArgument where every expert is resident.
  TransferTiming measure_transfers(std::size_t layer, std::span<const std::size_t> experts,
                                   std::size_t first_record, const Checkpointer& while_waiting);

  void publish(const GenerationStats& stats);
  void publish(const BatchStats& stats);
  // Bytes of weights and KV cache that decoding one token reads, at a position.
  std::size_t decode_bytes(std::size_t position) const { return decoder_->decode_bytes(position); }

  // Tokens that go through the layers together.
  std::size_t max_pass_tokens() const {
    return std::min(static_cast<std::size_t>(options_.prefill_chunk), context_length());
  }

  // Throws InvalidArgument for an empty list, ids out of range, or more than the context holds.
  void check_prompt(std::span<const std::int32_t> token_ids) const;

  // A forked process uses the model of its parent with threads of its own, unless the parent was at
  // work during the fork, or the device is not the CPU. Held by everything that uses the model.
  class Use {
   public:
    // ForkError where the process must not.
    explicit Use(const Model& model) { model.check_process(); }

   private:
    InUse in_use_;
  };
  // Whether this process must not even destroy the model.
  bool is_lost() const noexcept;

  // A device that fails in the middle of its work closes the model: what was on it is lost. From
  // then on everything that computes throws this DeviceError, which names the failure.
  void check_open() const;

 private:
  void check_process() const;
  friend class BatchGeneration;
  friend class Session;
  void close(const DeviceError& cause) noexcept;
  // For destructors, which may run on any thread.
  void make_current() noexcept;
  // Everything that uses the device goes through this.
  template <typename Body>
  auto on_device(Body&& body) {
    const Use use(*this);
    check_open();
    try {
      plan_.backend->make_current();
      return body();
    } catch (const DeviceError& error) {
      close(error);
      throw;
    }
  }

  // Nothing else runs on the model meanwhile. If `body` throws, what it issued has ended: the next
  // stream knows nothing of this one, and both use the expert cache.
  template <typename Body>
  void run_alone(PassMemory& memory, Body&& body) {
    const Use use(*this);
    const std::lock_guard lock(step_mutex_);
    on_device([&] {
      try {
        body();
      } catch (...) {
        settle(memory);
        throw;
      }
    });
  }
  static void settle(PassMemory& memory) noexcept;

  Model(ModelPlan plan, const ModelOptions& options);

  void warm_cache(const LoadProgress& progress);

  // Memory of sessions that have ended serves the next: pages fresh from the system must be zeroed
  // first, which for a short prompt costs more than the prompt.
  std::unique_ptr<PassMemory> borrow_pass_memory();
  void return_pass_memory(std::unique_ptr<PassMemory> memory) noexcept;

  Origin origin_;
  ModelPlan plan_;
  ModelOptions options_;
  EventLog events_;
  std::optional<HostMemoryTiers> host_;
  std::unique_ptr<ExpertStore> store_;
  std::unique_ptr<ExpertCache> cache_;
  std::unique_ptr<Decoder> decoder_;
  LoadStats load_stats_;
  std::mutex step_mutex_;
  std::mutex memory_mutex_;
  std::unique_ptr<PassMemory> idle_memory_;
  mutable std::mutex failure_mutex_;
  std::optional<DeviceError> failure_;
  mutable std::mutex stats_mutex_;
  std::optional<GenerationStats> generation_stats_;
  std::optional<BatchStats> batch_stats_;
};

}  // namespace moerun
