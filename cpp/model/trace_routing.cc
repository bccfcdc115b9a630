#include "model/trace_routing.h"

#include <algorithm>
#include <vector>

#include "base/error.h"

namespace moerun {
namespace {

RoutingRecord make_record(const Model& model, std::size_t first_position, std::size_t num_tokens,
                          const RoutingRecordOptions& options) {
  RoutingRecord record;
  record.num_layers = model.weights().num_moe_layers();
  record.num_tokens = num_tokens;
  record.top_k = static_cast<std::size_t>(model.config().top_k);
  record.num_experts = static_cast<std::size_t>(model.config().num_experts);
  record.first_position = first_position;
  record.options = options;
  record.allocate();
  return record;
}

}  // namespace

RoutingRecord trace_routing(const std::shared_ptr<Model>& model,
                            std::span<const std::int32_t> token_ids,
                            const RoutingRecordOptions& options,
                            const Checkpointer& between_layers) {
  const Model::Use use(*model);
  model->check_prompt(token_ids);
  RoutingRecord record = make_record(*model, 0, token_ids.size(), options);
  std::copy(token_ids.begin(), token_ids.end(), record.token_ids.begin());
  Session(model).append(token_ids, {}, between_layers, &record);
  return record;
}

RoutingRecord trace_decoding(const std::shared_ptr<Model>& model,
                             std::span<const std::int32_t> prompt, std::size_t num_tokens,
                             const SamplingParams& sampling, const RoutingRecordOptions& options,
                             const Checkpointer& between_layers) {
  const Model::Use use(*model);
  model->check_prompt(prompt);
  if (num_tokens == 0 || num_tokens > model->context_length() - prompt.size()) {
    throw InvalidArgument(message("generate: expected 1 to ",
                                  model->context_length() - prompt.size(),
                                  " tokens after the prompt, found ", num_tokens));
  }
  RoutingRecord record = make_record(*model, prompt.size(), num_tokens, options);
  Session session(model);
  Sampler sampler(sampling, static_cast<std::size_t>(model->config().vocab_size));
  std::vector<float> logits(static_cast<std::size_t>(model->config().vocab_size));
  session.append(prompt, logits, between_layers);
  for (std::int32_t& token : record.token_ids) {
    token = sampler.sample(logits);
    session.append({&token, 1}, logits, between_layers, &record);
  }
  return record;
}

}  // namespace moerun
