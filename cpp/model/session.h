// One sequence: its KV cache, and how far it has come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "model/decode_graph.h"
#include "model/kv_cache.h"
#include "model/model.h"
#include "model/workspace.h"

namespace moerun {

class Session {
 public:
  // Throws OutOfMemory, and DeviceError where the device has failed. With `keeps_non_finite`, NaN
  // and infinity stay in the logits; without, a pass that computes them is a FormatError.
  explicit Session(std::shared_ptr<Model> model, bool keeps_non_finite = false);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Appends tokens and computes the logits of the last one, of all, or of none: `logits` has
  // (1, vocab_size), (token_ids.size(), vocab_size) or no floats. `record` is told of the routing.
  // All tokens so far have the keys, and in `record` the routing, of one pass over the whole text:
  // where a longer text takes other rotary frequencies, they are computed anew. A call that throws
  // appends nothing. A DeviceError closes the model: see Model::check_open().
  void append(std::span<const std::int32_t> token_ids, std::span<float> logits,
              const Checkpointer& between_layers, RoutingRecord* record = nullptr);

  std::size_t num_tokens() const { return token_ids_.size(); }
  std::size_t kv_cache_bytes() const { return kv_cache_.bytes_for(num_tokens()); }
  std::size_t scratch_bytes() const { return memory_->bytes(); }
  Model& model() { return *model_; }
  const Model& model() const { return *model_; }

 private:
  void compute_anew(std::size_t length, const Checkpointer& between_layers, RoutingRecord* record);
  void run(std::span<const std::int32_t> token_ids, std::size_t length, std::span<float> logits,
           const Checkpointer& between_layers, RoutingRecord* record);
  void record_predictions(const Decoder::Pass& pass, RoutingRecord& record);

  std::shared_ptr<Model> model_;
  std::unique_ptr<PassMemory> memory_;  // borrowed from the model
  KvCache kv_cache_;
  std::unique_ptr<DecodeGraph> graph_;  // where the device needs no host to decode
  std::vector<std::int32_t> token_ids_;
  std::size_t num_stored_ = 0;  // tokens in the KV cache; after a call that threw not token_ids_
  bool keeps_non_finite_;
  bool is_long_ = false;  // the keys there are rotated for a long text
};

}  // namespace moerun
