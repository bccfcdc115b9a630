#include "model/forward.h"

#include <vector>

#include "base/error.h"
#include "base/finite.h"

namespace moerun {

void forward(const std::shared_ptr<Model>& model, std::span<const std::int32_t> token_ids,
             std::span<float> logits, const Checkpointer& between_layers) {
  const Model::Use use(*model);
  model->check_prompt(token_ids);
  Session(model).append(token_ids, logits, between_layers);
}

std::string forward_with_non_finite(const std::shared_ptr<Model>& model,
                                    std::span<const std::int32_t> token_ids,
                                    std::span<float> logits, const Checkpointer& between_layers) {
  const Model::Use use(*model);
  model->check_prompt(token_ids);
  Session(model, /*keeps_non_finite=*/true).append(token_ids, logits, between_layers);
  if (all_finite(logits)) return {};
  // Only the refusal knows where they came from, so the pass is computed again.
  std::vector<float> same(logits.size());
  try {
    Session(model).append(token_ids, same, between_layers);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "the logits are not all finite";
}

}  // namespace moerun
