#include "model/forward.h"

#include <algorithm>

namespace moerun {

void forward(const std::shared_ptr<Model>& model, std::span<const std::int32_t> token_ids,
             std::span<float> logits, const Checkpointer& between_layers) {
  model->check_prompt(token_ids);
  const auto chunk = static_cast<std::size_t>(model->options().prefill_chunk);
  Session session(model, std::min(chunk, token_ids.size()));
  session.append(token_ids, logits, between_layers);
}

}  // namespace moerun
