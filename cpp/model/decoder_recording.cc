// What the decoder tells a RoutingRecord.
#include <vector>

#include "base/finite.h"
#include "model/decoder.h"

namespace moerun {

void Decoder::record_logits(const Pass& pass, std::size_t index, Activations logits) const {
  std::vector<float> rows(logits.rows * logits.pitch);
  backend_.copy(pass.stream, reinterpret_cast<std::byte*>(rows.data()),
                reinterpret_cast<const std::byte*>(logits.data), rows.size() * sizeof(float));
  pass.stream.synchronize();
  for (std::size_t t = 0; t < logits.rows; ++t) {
    pass.record->record_logits(weights_.moe_index(index), pass.only_sequence().first_position + t,
                               {rows.data() + t * logits.pitch, logits.cols});
  }
}

void Decoder::record_routing(const Pass& pass, std::size_t index, const Routing& routing) const {
  for (std::size_t t = 0; t < routing.tokens; ++t) {
    const std::size_t first = t * routing.slots;
    using Part = NonFinitePlace::Part;
    if (!all_finite({routing.expert_weights + first, router_.top_k})) {
      refuse_non_finite(config_, weights_, pass.token_ids,
                        {backend_.is_host() ? Part::layer : Part::up_to_layer, index});
    }
    pass.record->record(weights_.moe_index(index), pass.only_sequence().first_position + t,
                        {routing.expert_ids + first, router_.top_k},
                        {routing.expert_weights + first, router_.top_k});
  }
}

bool Decoder::wants_predictions(const Pass& pass) {
  return pass.record != nullptr && pass.record->options.with_prefetch;
}

// What the prefetcher would be told now for a layer, if there is one: for the tokens so many
// positions after these.
void Decoder::record_predictions(const Pass& pass, std::optional<std::size_t> layer,
                                 std::size_t ahead) {
  if (!layer) return;
  const std::size_t tokens = pass.token_ids.size();
  if (!recorder_ || recorder_->max_tokens() < tokens) {
    recorder_.emplace(weights_, router_.top_k, backend_, pass.workspace.max_tokens());
  }
  const RouteRequest request = recorder_->request(*layer, pass.workspace.hidden.slice(0, tokens));
  backend_.choose_experts(pass.stream, router_, {&request, 1});
  backend_.wait_for_choice(pass.stream, 0);
  for (std::size_t t = 0; t < tokens; ++t) {
    pass.record->record_prefetch(weights_.moe_index(*layer),
                                 pass.only_sequence().first_position + t + ahead,
                                 recorder_->predicted(t));
  }
}

}  // namespace moerun
