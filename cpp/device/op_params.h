// What the operations of a backend take, in plain data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/view.h"

namespace moerun {

enum class NormKind { rms, layer };

enum class RouterKind {
  softmax_top_k,  // softmax over all experts, then the k largest, renormalised if norm_topk_prob
  top_k_softmax,  // the k largest logits, then softmax over those (Granite)
  sparse_mixer    // two rounds of thresholded softmax (Phi-MoE, arXiv 2409.12136)
};

struct NormWeights {
  NormKind kind = NormKind::rms;
  const float* weight = nullptr;  // (n)
  const float* bias = nullptr;    // (n)?
  float eps = 0;
};

struct LinearWeights {
  MatrixView weight;            // (out_features, in_features)
  const float* bias = nullptr;  // (out_features)?
};

// What happens to a product: y = scale * (x W^T + bias), or y += that.
struct LinearOutput {
  float scale = 1;
  bool accumulate = false;
  bool is_routing = false;  // decides which experts are used: never in less than float32
};

struct RouterParams {
  RouterKind kind = RouterKind::softmax_top_k;
  bool norm_topk_prob = false;
  float jitter_noise = 0;  // sparse_mixer
  std::size_t top_k = 0;
};

// Which experts every token uses, and how much. Slot `s` of token `t` is entry t * slots + s.
struct Routing {
  std::int32_t* expert_ids = nullptr;  // (tokens, slots), the routed ones by falling router score
  float* expert_weights = nullptr;     // (tokens, slots)
  std::size_t tokens = 0;
  std::size_t slots = 0;  // top_k, plus one where the layer has a shared expert

  std::size_t num_pairs() const { return tokens * slots; }
};

// One router applied to some tokens, and where its choice goes.
struct RouteRequest {
  MatrixView router;                  // (num_experts, hidden_size)
  const NormWeights* norm = nullptr;  // x is normalised by it first; null: it is already
  MatrixView shared_gate;             // (1, hidden_size)?
  bool has_shared = false;            // the last slot goes to the shared expert, num_experts
  Activations x;                      // (tokens, hidden_size)
  Activations normed;                 // memory for norm(x), where there is a norm
  Activations logits;                 // (tokens, num_experts): becomes the router's product
  Routing routing;
  Routing on_host;  // MemoryUse::shared, gets a copy; the same memory as `routing`, or none
};

// Of the first token of an operation. One that is recorded and run again finds its own in memory of
// the device, and `value` is the largest that it may find there.
struct Position {
  Position(std::size_t number) : value(number) {}
  Position(std::size_t largest, const std::int32_t* where) : value(largest), on_device(where) {}

  std::size_t value;
  const std::int32_t* on_device = nullptr;
};

struct AttentionShape {
  std::size_t num_heads = 0;
  std::size_t num_kv_heads = 0;
  std::size_t head_dim = 0;
};

// The KV cache of one layer: keys and values, each (num_kv_heads, capacity, pitch).
struct KvLayer {
  float* keys = nullptr;
  float* values = nullptr;
  std::size_t capacity = 0;  // tokens
  std::size_t pitch = 0;     // floats, >= head_dim
};

// Consecutive rows of a pass that are the next tokens of one sequence, and its KV cache of a layer.
struct SequenceRows {
  std::size_t num_rows = 0;
  std::size_t first_position = 0;
  KvLayer kv;
};

// Normalises (optionally), rotates, and stores the keys and values of new tokens.
struct RotaryParams {
  const float* inv_freq = nullptr;  // (head_dim / 2)
  float scale = 1;                  // of cos and sin
  NormWeights q_norm;               // weight null: none
  NormWeights k_norm;
  bool norm_per_head = false;  // else over all heads together
  float clip = 0;              // clamp q, k, v to +-clip; 0: do not
};

struct AttentionParams {
  float scale = 1;
  std::size_t window = 0;  // attend to the last `window` tokens; 0: to all
  // q, k and v come from weights of 16 bits: where it is faster, they may be rounded to 11 (tf32).
  bool may_round = false;
};

// The experts of a layer as the kernels see them.
struct ExpertShape {
  std::size_t hidden_size = 0;
  std::size_t num_experts = 0;        // ids below are routed experts, this id is the shared one
  std::size_t intermediate_size = 0;  // records of a routed expert
  std::size_t shared_intermediate_size = 0;  // records of the shared expert
  DType dtype = DType::f32;
  DType shared_dtype = DType::f32;

  bool is_shared(std::size_t expert) const { return expert == num_experts; }
  std::size_t num_records(std::size_t expert) const {
    return is_shared(expert) ? shared_intermediate_size : intermediate_size;
  }
  DType dtype_of(std::size_t expert) const { return is_shared(expert) ? shared_dtype : dtype; }
};

// Sums over records are formed per quantum of this many and added in index order, so that results
// do not depend on where an expert is cut. Segments start on a multiple of it.
inline constexpr std::size_t kQuantumRecords = 32;

// A run of records of one expert, wherever it lies in the device's fast memory.
struct Segment {
  std::size_t expert = 0;
  std::size_t first_record = 0;
  std::size_t num_records = 0;
  ConstBytes records;       // (num_records, 3, padded(hidden_size)): gate, up, down
  std::uint64_t ready = 0;  // a CopyQueue::Mark: when the records are there
};

}  // namespace moerun
