// The weights of a model in memory, as the operations of a backend take them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/host_memory.h"
#include "base/thread_pool.h"
#include "device/backend.h"
#include "device/op_params.h"
#include "io/checkpoint.h"
#include "weights/load_plan.h"
#include "weights/model_config.h"

namespace moerun {

// Where the checkpoint has one routed expert.
struct ExpertFiles {
  FileMatrix gate;  // (intermediate_size, hidden_size)
  FileMatrix up;    // (intermediate_size, hidden_size)
  FileMatrix down;  // (hidden_size, intermediate_size)
};

struct LayerWeights {
  NormWeights input_norm;
  LinearWeights qkv;  // (heads + 2 kv_heads) * head_dim rows: q, then k, then v
  NormWeights q_norm;
  NormWeights k_norm;
  LinearWeights o_proj;
  NormWeights post_attention_norm;

  MatrixView router;          // (num_experts, hidden_size); none in a layer without experts
  MatrixView shared_gate;     // (1, hidden_size)?
  ExpertShape experts;        // a dense layer is one shared expert without a gate
  MatrixView expert_records;  // (num_experts * intermediate_size * 3, hidden_size), if resident
  MatrixView shared_records;  // (shared_intermediate_size * 3, hidden_size)

  std::vector<ExpertFiles> expert_files;  // (num_experts)

  bool has_shared_expert() const { return experts.shared_intermediate_size != 0; }
  std::size_t record_bytes() const {
    return 3 * padded(experts.hidden_size) * size_of(experts.dtype);
  }
  std::size_t bytes_per_expert() const { return experts.intermediate_size * record_bytes(); }
  // The records of one expert, shared or (where they are resident) routed.
  ConstBytes records_of(std::size_t expert) const;
};

class HostExperts;

// Knows where everything is, loads it and owns it. Views point into memory that lives as long as
// this object.
class ModelWeights {
 public:
  // Finds every tensor and takes address space, reads no weights (but to compare the head with the
  // embedding, where the config calls them one and both are there). Throws FormatError for tensors
  // that are missing or of another shape than the config says, UnsupportedModel for tensors of a
  // layer that the architecture does not know. `checkpoint` must outlive this object.
  ModelWeights(const ModelConfig& config, const Checkpoint& checkpoint);
  ~ModelWeights();
  ModelWeights(const ModelWeights&) = delete;
  ModelWeights& operator=(const ModelWeights&) = delete;

  // Reads the weights, routed experts only `with_experts`. OutOfMemory when they, with the
  // `cache_bytes` that will hold experts otherwise, are larger than the memory that is free.
  void load(ThreadPool& pool, const LoadProgress& progress, bool with_experts,
            std::size_t cache_bytes);
  // The same with the routed experts that the host keeps for a device, into `experts`.
  void load(ThreadPool& pool, const LoadProgress& progress, const HostExperts& experts);

  // Moves what was loaded to plain memory to that of a device. `stream` is waited for.
  void move_to(Backend& backend, Stream& stream);

  MatrixView embedding;  // (vocab_size, hidden_size)
  NormWeights final_norm;
  LinearWeights lm_head;  // (vocab_size, hidden_size)
  std::vector<LayerWeights> layers;

  std::size_t resident_bytes() const { return resident_bytes_; }  // all but routed experts
  std::size_t expert_bytes() const { return expert_bytes_; }      // of all routed experts
  std::size_t num_moe_layers() const { return moe_index(layers.size()); }
  // How many layers with experts come before this one.
  std::size_t moe_index(std::size_t layer) const;
  std::uint64_t bytes_read() const { return bytes_read_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }
  const std::vector<std::string>& notes() const { return notes_; }  // for the user

 private:
  friend class WeightsBuilder;

  void check_memory(std::size_t expert_bytes) const;
  void run_plan(ThreadPool& pool, const LoadProgress& progress);

  const Checkpoint& checkpoint_;
  LoadPlan plan_;
  std::vector<HostMemory> memory_;
  std::vector<std::vector<float>> vectors_;
  std::vector<std::unique_ptr<DeviceBuffer>> device_memory_;  // in place of these two
  std::size_t resident_bytes_ = 0;
  std::size_t expert_bytes_ = 0;
  std::uint64_t bytes_read_ = 0;
  std::vector<std::string> notes_;
};

}  // namespace moerun
