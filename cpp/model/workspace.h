// The activations of one forward pass, for up to `max_tokens` tokens at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/backend.h"
#include "device/op_params.h"
#include "weights/model_config.h"

namespace moerun {

class Workspace {
 public:
  Workspace(const ModelConfig& config, std::size_t max_tokens, Backend& backend);

  Activations hidden;         // (max_tokens, hidden_size): the residual stream
  Activations normed;         // (max_tokens, hidden_size)
  Activations qkv;            // (max_tokens, (heads + 2 kv_heads) * head_dim)
  Activations attended;       // (max_tokens, heads * head_dim)
  Activations router_logits;  // (max_tokens, num_experts)
  // (kLogitRows, vocab_size), where the device does not compute in host memory; else none.
  Activations logits;
  static constexpr std::size_t kLogitRows = 64;

  // In memory of the device, and a copy that the host reads: the same memory where it can be.
  Routing routing(std::size_t tokens, std::size_t slots) const;
  Routing routing_on_host(std::size_t tokens, std::size_t slots) const;
  std::size_t max_tokens() const { return max_tokens_; }
  std::size_t bytes() const;
  // Of the device's own memory, of a workspace that has not been made.
  static std::size_t device_bytes_for(const ModelConfig& config, std::size_t max_tokens);

 private:
  Activations make(std::size_t rows, std::size_t cols);

  Backend& backend_;
  std::size_t max_tokens_;
  std::vector<std::unique_ptr<DeviceBuffer>> memory_;
  struct RoutingMemory {
    std::unique_ptr<DeviceBuffer> expert_ids;
    std::unique_ptr<DeviceBuffer> expert_weights;
  };
  RoutingMemory make_routing(std::size_t pairs, MemoryUse use);

  RoutingMemory routing_;
  RoutingMemory routing_on_host_;  // nothing where the device computes in host memory
};

}  // namespace moerun
