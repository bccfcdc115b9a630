// The forward pass: token ids in, logits out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "device/backend.h"
#include "expert/expert_cache.h"
#include "model/active_expert_counts.h"
#include "model/kv_cache.h"
#include "model/layer_times.h"
#include "model/non_finite.h"
#include "model/routing_replay.h"
#include "model/workspace.h"
#include "predict/next_layer_router.h"
#include "trace/routing_record.h"
#include "weights/model_config.h"
#include "weights/model_weights.h"
#include "weights/rope.h"

namespace moerun {

struct DecoderOptions {
  // Experts are computed in segments of this many records (a multiple of kQuantumRecords); 0:
  // whole. The result does not depend on it.
  std::size_t segment_records = 0;
  // Decoding uses these experts instead of the router's: to measure a cache with random weights.
  std::shared_ptr<const RoutingReplay> replay;
  // On a device: waits for it between attention and experts, so that layer_times() has something to
  // tell. Slower; for calibration.
  bool sync_times = false;
};

// Called between layers, and now and then while experts are waited for; may throw to abandon the
// pass.
using Checkpointer = std::function<void()>;

class Decoder {
 public:
  // `cache`: serves the routed experts; null where all of them are resident.
  Decoder(const ModelConfig& config, const ModelWeights& weights, Backend& backend,
          ExpertCache* cache, const DecoderOptions& options);

  // Where a recorded pass finds its token and its position, on the device.
  struct InputOnDevice {
    const std::int32_t* token_id;
    const std::int32_t* position;
  };

  // The next tokens of one sequence.
  struct Sequence {
    KvCache* kv_cache = nullptr;
    std::size_t first_position = 0;
    std::size_t num_tokens = 0;
    std::size_t length = 0;  // with these tokens and those to come of the same call
  };

  // What a pass works on: the KV caches of its sequences, and memory for activations.
  struct Pass {
    Stream& stream;
    Workspace& workspace;
    std::span<const std::int32_t> token_ids;  // of all sequences; at most workspace.max_tokens()
    std::span<const Sequence> sequences;      // in the order of their tokens; at least one
    bool is_decoding = false;                 // one token each, and not the rest of a longer prompt
    const Checkpointer* between_layers = nullptr;
    RoutingRecord* record = nullptr;  // told of the routing, of a single sequence
    // In place of token_ids and first_position, of which the latter is then the largest that may
    // come. Of a single sequence.
    const InputOnDevice* input = nullptr;
    ForecastSource* forecasts = nullptr;  // of a decoding pass's experts, for the cache
    bool keeps_non_finite = false;        // NaN and infinity stay in the logits, unrefused

    const Sequence& only_sequence() const { return sequences.front(); }
    bool is_batch() const { return sequences.size() > 1; }
  };

  // Runs all layers and leaves the normalised last hidden states in workspace.normed. FormatError
  // where a state is not finite; a device notices that only in logits and in a recorded routing.
  void run(const Pass& pass);
  // logits[i] = head(workspace.normed[first + i]). FormatError where one is not finite, as run().
  void compute_logits(const Pass& pass, std::size_t first, Activations logits) const;

  // The same of `rows` rows into workspace.logits, without waiting for them; on devices only.
  void issue_logits(const Pass& pass, std::size_t first, std::size_t rows) const;

  // For logits that came to the host by another way than compute_logits().
  void check_logits(const Pass& pass, std::span<const float> logits) const;

  // Whether the device can decode a token without the host, so that the pass can be recorded.
  bool needs_no_host() const { return !expert_tables_.empty(); }
  // Whether a sequence of this length takes other rotary frequencies than a short one.
  bool is_long(std::size_t sequence_length) const {
    return !rope_.inv_freq_long.empty() &&
           sequence_length > static_cast<std::size_t>(rope_.long_above);
  }

  // Bytes of weights and KV cache that decoding one token reads, at a position.
  std::size_t decode_bytes(std::size_t position) const;

  // Of steps that decoded with the host in between (see needs_no_host()).
  const ActiveExpertCounts& active_counts() const { return active_; }

  // Of passes of one sequence whose routing was not recorded. On devices: nothing, without
  // sync_times.
  const LayerTimes& layer_times() const { return times_; }

 private:
  void run_layer(const Pass& pass, std::size_t index);
  void attend(const Pass& pass, std::size_t index);
  void run_experts(const Pass& pass, std::size_t index);
  bool is_timed(const Pass& pass) const;
  double moment(const Pass& pass) const;
  void choose_experts(const Pass& pass, std::size_t index, bool for_host);
  std::size_t num_slots(const LayerWeights& layer) const;
  void count_active(const Pass& pass, std::size_t index, const Routing& on_host);
  std::optional<std::size_t> layer_with_experts_from(std::size_t index) const;
  void make_expert_tables();
  void compute_resident(const Pass& pass, std::size_t index, const Routing& on_host);
  // Returns the seconds of waiting for experts.
  double compute_cached(const Pass& pass, std::size_t index, const Routing& on_host);
  void check_states(const Pass& pass, Activations states, const NonFinitePlace& place) const;
  void check_replay(const RoutingReplay& replay) const;
  void replay_routing(const Pass& pass, std::size_t index) const;
  void record_logits(const Pass& pass, std::size_t index, Activations logits) const;
  void record_routing(const Pass& pass, std::size_t index, const Routing& routing) const;
  static bool wants_predictions(const Pass& pass);
  void record_predictions(const Pass& pass, std::optional<std::size_t> layer, std::size_t ahead);
  void prefetch_after(const Pass& pass, std::size_t index);
  void prefetch_layer(const Pass& pass, std::size_t index, bool is_for_next_token);
  void move_rope();
  NextLayerRouter& predictor_for(const Pass& pass);
  RotaryParams rotary(const LayerWeights& layer, std::size_t sequence_length) const;

  const ModelConfig& config_;
  const ModelWeights& weights_;
  Backend& backend_;
  ExpertCache* cache_;
  DecoderOptions options_;
  std::optional<NextLayerRouter> predictor_;  // see predictor_for()
  std::optional<NextLayerRouter> recorder_;   // of predictions, for many tokens at once
  bool is_predicted_ = false;  // the layer's own choice came with that of the next one
  std::vector<std::unique_ptr<DeviceBuffer>> expert_tables_;  // (layers); see needs_no_host()
  std::uint64_t num_decoded_ = 0;
  std::vector<std::size_t> num_active_;  // (layers with experts) of the pass
  ActiveExpertCounts active_;
  LayerTimes times_;
  AttentionShape attention_shape_;
  RouterParams router_;
  RopeTable rope_;
  std::unique_ptr<DeviceBuffer> device_rope_;  // its numbers, where the device needs a copy
};

}  // namespace moerun
