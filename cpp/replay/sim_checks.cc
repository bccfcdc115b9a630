#include "replay/sim_checks.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "plan/cost_model.h"
#include "trace/routing_record.h"

namespace moerun {
namespace {

void check_seconds(const char* name, double seconds) {
  if (is_cost(seconds)) return;
  throw InvalidArgument(message(name, ": expected at least 0 and at most ", kMaxCostSeconds,
                                " seconds, found ", seconds));
}

// All different and below num_experts. The cache relies on it.
bool are_experts(std::span<const std::uint16_t> ids, std::size_t num_experts) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= num_experts) return false;
    if (std::find(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(i), ids[i]) !=
        ids.begin() + static_cast<std::ptrdiff_t>(i)) {
      return false;
    }
  }
  return true;
}

void check_ids(const char* name, std::span<const std::uint16_t> ids, const SimSequence& sequence,
               std::size_t number, const ModelWeights& weights, std::size_t top_k,
               bool may_be_none) {
  const std::size_t layers = weights.num_moe_layers();
  if (ids.size() != layers * sequence.num_tokens * top_k) {
    throw InvalidArgument(message("sequence ", number, ": ", name, ": expected the shape (", layers,
                                  ", ", sequence.num_tokens, ", ", top_k, "), found ", ids.size(),
                                  " numbers"));
  }
  std::size_t index = 0;
  for (const LayerWeights& layer : weights.layers) {
    const std::size_t experts = layer.experts.num_experts;
    if (experts == 0) continue;
    for (std::size_t token = 0; token < sequence.num_tokens; ++token) {
      const auto of_token = ids.subspan((index * sequence.num_tokens + token) * top_k, top_k);
      if (may_be_none && of_token.front() == kNoExpert) continue;
      if (are_experts(of_token, experts)) continue;
      throw InvalidArgument(message("sequence ", number, ": ", name, ": token ", token, ", layer ",
                                    index, " of those with experts: expected ", top_k,
                                    " different experts from 0 to ", experts - 1));
    }
    ++index;
  }
}

}  // namespace

void check_sim_costs(const SimCosts& costs, std::size_t num_layers) {
  const std::pair<const char*, const std::vector<double>*> lists[] = {
      {"attention_s", &costs.attention_s}, {"moe_s", &costs.moe_s}, {"prompt_s", &costs.prompt_s}};
  for (const auto& [name, list] : lists) {
    if (list->size() != num_layers) {
      throw InvalidArgument(message(name, ": expected a number for each of the ", num_layers,
                                    " layers with experts, found ", list->size()));
    }
    for (const double seconds : *list) check_seconds(name, seconds);
  }
  check_seconds("head_s", costs.head_s);
  check_seconds("wake_s", costs.wake_s);
  check_seconds("predict_s", costs.predict_s);
  if (!is_cost(costs.slowdown)) {
    throw InvalidArgument(message("slowdown: expected at least 0 and at most ", kMaxCostSeconds,
                                  ", found ", costs.slowdown));
  }
  check_link_cost(costs.link);
}

void check_sim_sequences(std::span<const SimSequence> sequences, const ModelWeights& weights,
                         std::size_t top_k) {
  if (sequences.empty()) throw InvalidArgument("there are no sequences to simulate");
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const SimSequence& sequence = sequences[i];
    if (sequence.prompt_tokens >= sequence.num_tokens) {
      throw InvalidArgument(message("sequence ", i, " has ", sequence.num_tokens,
                                    " tokens, too few to decode any after a prompt of ",
                                    sequence.prompt_tokens, "; lower prompt_tokens"));
    }
    check_ids("expert_ids", sequence.expert_ids, sequence, i, weights, top_k, false);
    if (sequence.prefetch_ids.empty()) continue;
    check_ids("prefetch_ids", sequence.prefetch_ids, sequence, i, weights, top_k, true);
  }
}

void check_sim_options(const SimOptions& options, std::span<const SimSequence> sequences) {
  if (options.prefill_chunk == 0) {
    throw InvalidArgument("prefill_chunk: expected at least 1, found 0");
  }
  if (options.batch_size > options.prefill_chunk) {
    throw InvalidArgument(message("batch_size: expected at most ", options.prefill_chunk,
                                  " (as many tokens as may go through the layers together: "
                                  "prefill_chunk, at most context_length), found ",
                                  options.batch_size));
  }
  if (options.batch_size == 0) {
    if (options.schedule == ScheduleMode::off && options.predictor.empty()) return;
    throw InvalidArgument(
        "predictor and schedule: they are of a batch; give batch_size, also where it is 1");
  }
  if (options.is_belady) {
    throw InvalidArgument(
        "policy: belady knows the future of one sequence after the other, not of a batch; leave "
        "batch_size out, or take another policy");
  }
  if (options.schedule == ScheduleMode::automatic) {
    throw InvalidArgument(
        "schedule: auto compares measured times, and a simulation does not know what predicting "
        "takes; simulate with it on and with it off");
  }
  if (options.predictor.empty()) {
    if (options.schedule == ScheduleMode::off) return;
    throw InvalidArgument(
        "schedule: it needs a predictor of the experts that texts will use; train one with "
        "moe-predictor, or switch it off");
  }
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i].token_ids.size() == sequences[i].num_tokens) continue;
    throw InvalidArgument(message(
        "token_ids: a predictor needs those of all ", sequences[i].num_tokens,
        " tokens of sequence ", i, ", and the trace has ", sequences[i].token_ids.size(),
        "; record it with moe-trace record, which keeps them, or simulate without a predictor"));
  }
}

}  // namespace moerun
