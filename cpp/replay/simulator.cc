#include "replay/simulator.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "replay/sim_batch.h"
#include "replay/sim_checks.h"
#include "replay/sim_passes.h"

namespace moerun {
namespace {

// As Generation and Session: a prompt goes in chunks, and one of a single token is decoded.
void run_sequence(const SimSequence& sequence, const SimOptions& options, SimPasses& passes,
                  SimResult& result) {
  const VirtualClock& clock = passes.clock();
  const double begin = clock.now();
  std::size_t token = 0;
  const auto kind = sequence.prompt_tokens == 1 ? SimPasses::Kind::decode : SimPasses::Kind::prompt;
  while (token < sequence.prompt_tokens) {
    const SimRows rows{&sequence, token,
                       std::min(options.prefill_chunk, sequence.prompt_tokens - token)};
    passes.run({&rows, 1}, kind);
    token += rows.count;
  }
  if (token != 0) {
    passes.compute_head(1);
    result.ttft_s.push_back(clock.now() - begin);
  }
  for (; token < sequence.num_tokens; ++token) {
    const double token_begin = clock.now();
    const SimRows rows{&sequence, token, 1};
    passes.run({&rows, 1}, SimPasses::Kind::decode);
    passes.compute_head(1);
    result.token_s.push_back(clock.now() - token_begin);
  }
}

// Whether somebody says what is to be read ahead: the routers that were recorded, or a predictor.
bool has_predictions(std::span<const SimSequence> sequences, const SimOptions& options,
                     const CacheLayout& layout) {
  if (layout.is_pool && !options.predictor.empty()) return true;
  return std::none_of(sequences.begin(), sequences.end(),
                      [](const SimSequence& each) { return each.prefetch_ids.empty(); });
}

}  // namespace

SimResult simulate(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
                   const PieceSizes& sizes, const SimCosts& costs,
                   std::span<const SimSequence> sequences, const SimOptions& options) {
  check_sim_costs(costs, weights.num_moe_layers());
  check_sim_sequences(sequences, weights, top_k);
  check_sim_options(options, sequences);
  if (!has_predictions(sequences, options, layout)) {
    if (layout.prefetch == PrefetchMode::on) {
      throw InvalidArgument(
          "prefetch: to simulate it, the trace has to say what would be predicted; record it with "
          "--with-prefetch, or simulate with prefetch off");
    }
    layout.prefetch = PrefetchMode::off;
  }
  SimResult result;
  result.prefetch = layout.prefetch;
  const bool is_pool = layout.is_pool;
  SimPasses passes(weights, std::move(layout), top_k, sizes, costs, sequences, options);
  if (options.batch_size != 0) {
    result.batch = SimBatch(passes, costs, sequences, options, is_pool).run(result);
  } else {
    for (const SimSequence& sequence : sequences) run_sequence(sequence, options, passes, result);
  }
  passes.report(result);
  result.stats.is_direct = sizes.is_direct();
  return result;
}

}  // namespace moerun
