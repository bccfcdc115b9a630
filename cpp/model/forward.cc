#include "model/forward.h"

namespace moerun {

void forward(const std::shared_ptr<Model>& model, std::span<const std::int32_t> token_ids,
             std::span<float> logits, const Checkpointer& between_layers) {
  const Model::Use use(*model);
  model->check_prompt(token_ids);
  Session(model).append(token_ids, logits, between_layers);
}

}  // namespace moerun
