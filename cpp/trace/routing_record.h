// The routing of the tokens of one sequence, kept while the model runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace moerun {

struct RoutingRecordOptions {
  bool with_weights = false;
  bool with_logits = false;
  bool with_predictions = false;  // the likeliest next token after each
  bool with_prefetch = false;     // the experts that the prefetcher would be told
};

// In place of an expert: none was named.
inline constexpr std::uint16_t kNoExpert = 65535;

struct RoutingRecord {
  std::size_t num_layers = 0;  // those with experts
  std::size_t num_tokens = 0;
  std::size_t top_k = 0;
  std::size_t num_experts = 0;
  std::size_t first_position = 0;  // of the first token that is recorded
  RoutingRecordOptions options;
  std::vector<std::int32_t> token_ids;      // (num_tokens)
  std::vector<std::uint16_t> expert_ids;    // (num_layers, num_tokens, top_k)
  std::vector<float> expert_weights;        // (num_layers, num_tokens, top_k)?
  std::vector<float> router_logits;         // (num_layers, num_tokens, num_experts)?
  std::vector<std::int32_t> predicted_ids;  // (num_tokens)?
  std::vector<std::uint16_t> prefetch_ids;  // (num_layers, num_tokens, top_k)? kNoExpert: none

  // Makes room for all of it.
  void allocate();

  bool holds(std::size_t position) const {
    return position >= first_position && position - first_position < num_tokens;
  }
  // Of the token at `position`, in the layer_index-th layer with experts. A token that is not in
  // the record is left out, here and below; one that comes again replaces what was recorded.
  void record(std::size_t layer_index, std::size_t position, std::span<const std::int32_t> ids,
              std::span<const float> weights);
  void record_logits(std::size_t layer_index, std::size_t position, std::span<const float> logits);
  void record_prefetch(std::size_t layer_index, std::size_t position,
                       std::span<const std::size_t> ids);
};

}  // namespace moerun
