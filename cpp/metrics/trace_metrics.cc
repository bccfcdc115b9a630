#include "metrics/trace_metrics.h"

#include <algorithm>

#include "base/error.h"
#include "metrics/layer_prediction.h"
#include "metrics/window_balance.h"

namespace moerun {
namespace {

using Memory = std::vector<std::uint16_t>;

// body(sequence, layer, item, memory) for each pair.
template <typename Body>
void for_each_layer(const TraceView& trace, ThreadPool& pool, const Body& body) {
  std::vector<Memory> memory(static_cast<std::size_t>(pool.num_threads()));
  pool.parallel_for(trace.num_sequences() * trace.num_layers, [&](std::size_t item, int worker) {
    body(item / trace.num_layers, item % trace.num_layers, item,
         memory[static_cast<std::size_t>(worker)]);
  });
}

void check_length(std::size_t segment_length) {
  if (segment_length == 0) throw InvalidArgument("segment_length: expected at least 1, found 0");
}

}  // namespace

std::vector<std::uint64_t> layer_histograms(const TraceView& trace, std::size_t segment_length,
                                            ThreadPool& pool) {
  check_length(segment_length);
  const std::size_t row = segment_length + 1;
  std::vector<std::uint64_t> counts(trace.num_sequences() * trace.num_layers * row, 0);
  for_each_layer(trace, pool, [&](std::size_t s, std::size_t l, std::size_t item, Memory& memory) {
    // Counted apart: rows of other threads lie in the same cache lines.
    std::vector<std::uint64_t> own(row, 0);
    count_activations(trace.of_layer(s, l, memory), segment_length, CountBy::layer, own);
    std::copy(own.begin(), own.end(), counts.begin() + static_cast<std::ptrdiff_t>(item * row));
  });
  return counts;
}

std::vector<std::uint64_t> expert_histograms(const TraceView& trace, std::size_t segment_length,
                                             ThreadPool& pool) {
  check_length(segment_length);
  const std::size_t row = trace.num_experts * (segment_length + 1);
  std::vector<std::uint64_t> counts(trace.num_layers * row, 0);
  std::vector<Memory> memory(static_cast<std::size_t>(pool.num_threads()));
  pool.parallel_for(trace.num_layers, [&](std::size_t layer, int worker) {
    for (std::size_t s = 0; s < trace.num_sequences(); ++s) {
      count_activations(trace.of_layer(s, layer, memory[static_cast<std::size_t>(worker)]),
                        segment_length, CountBy::expert,
                        std::span(counts).subspan(layer * row, row));
    }
  });
  return counts;
}

std::vector<std::uint32_t> expert_histograms_by_sequence(const TraceView& trace, std::size_t layer,
                                                         std::size_t segment_length,
                                                         ThreadPool& pool) {
  check_length(segment_length);
  const std::size_t row = trace.num_experts * (segment_length + 1);
  std::vector<std::uint32_t> counts(trace.num_sequences() * row, 0);
  struct Scratch {
    Memory ids;
    std::vector<std::uint64_t> counts;
  };
  std::vector<Scratch> scratch(static_cast<std::size_t>(pool.num_threads()));
  pool.parallel_for(trace.num_sequences(), [&](std::size_t s, int worker) {
    Scratch& own = scratch[static_cast<std::size_t>(worker)];
    own.counts.assign(row, 0);
    count_activations(trace.of_layer(s, layer, own.ids), segment_length, CountBy::expert,
                      own.counts);
    std::transform(own.counts.begin(), own.counts.end(),
                   counts.begin() + static_cast<std::ptrdiff_t>(s * row),
                   [](std::uint64_t count) { return static_cast<std::uint32_t>(count); });
  });
  return counts;
}

std::vector<std::uint64_t> replay_hits(const TraceView& trace, ReplayPolicy policy,
                                       std::size_t segment_length, bool one_pool,
                                       ThreadPool& pool) {
  check_length(segment_length);
  const std::size_t caches = one_pool ? 1 : trace.num_layers;
  const std::size_t row = (one_pool ? trace.num_layers : 1) * trace.num_experts + 1;
  std::vector<std::uint64_t> hits(trace.num_sequences() * caches * row, 0);
  std::vector<Memory> memory(static_cast<std::size_t>(pool.num_threads()));
  pool.parallel_for(trace.num_sequences() * caches, [&](std::size_t item, int worker) {
    Memory& own = memory[static_cast<std::size_t>(worker)];
    const RoutingView routing =
        one_pool ? trace.of_pool(item, own) : trace.of_layer(item / caches, item % caches, own);
    const auto found = hits_by_capacity(routing, policy, segment_length);
    std::copy(found.begin(), found.end(), hits.begin() + static_cast<std::ptrdiff_t>(item * row));
  });
  return hits;
}

std::vector<std::uint64_t> num_activations(const TraceView& trace, ThreadPool& pool) {
  std::vector<std::uint64_t> counts(trace.num_sequences() * trace.num_layers * trace.num_experts,
                                    0);
  for_each_layer(trace, pool, [&](std::size_t s, std::size_t l, std::size_t item, Memory& memory) {
    for (const std::size_t expert : trace.of_layer(s, l, memory).expert_ids) {
      ++counts[item * trace.num_experts + expert];
    }
  });
  return counts;
}

std::vector<double> window_deviations(const TraceView& trace, std::size_t segment_length,
                                      ThreadPool& pool) {
  check_length(segment_length);
  std::vector<double> sums(trace.num_sequences() * trace.num_layers, 0);
  for_each_layer(trace, pool, [&](std::size_t s, std::size_t l, std::size_t item, Memory& memory) {
    sums[item] = sum_of_deviations(trace.of_layer(s, l, memory), segment_length);
  });
  return sums;
}

std::vector<std::uint64_t> previous_token_hits(const TraceView& trace, ThreadPool& pool) {
  std::vector<std::uint64_t> hits(trace.num_sequences() * trace.num_layers, 0);
  for_each_layer(trace, pool, [&](std::size_t s, std::size_t l, std::size_t item, Memory& memory) {
    hits[item] = hits_of_previous_token(trace.of_layer(s, l, memory));
  });
  return hits;
}

std::vector<std::uint64_t> layer_pairs(const TraceView& trace, ThreadPool& pool) {
  const std::size_t table = trace.num_experts * trace.num_experts;
  std::vector<std::uint64_t> pairs((trace.num_layers - 1) * table, 0);
  struct Scratch {
    Memory layer;
    Memory next;
  };
  std::vector<Scratch> scratch(static_cast<std::size_t>(pool.num_threads()));
  pool.parallel_for(trace.num_layers - 1, [&](std::size_t layer, int worker) {
    Scratch& own = scratch[static_cast<std::size_t>(worker)];
    for (std::size_t s = 0; s < trace.num_sequences(); ++s) {
      count_pairs(trace.of_layer(s, layer, own.layer), trace.of_layer(s, layer + 1, own.next),
                  std::span(pairs).subspan(layer * table, table));
    }
  });
  return pairs;
}

std::vector<std::uint64_t> previous_layer_hits(const TraceView& trace,
                                               std::span<const float> weights, ThreadPool& pool) {
  const std::size_t table = trace.num_experts * trace.num_experts;
  const std::size_t predicted = trace.num_layers - 1;
  if (weights.size() != predicted * table) {
    throw InvalidArgument(
        message("weights: expected ", predicted * table, " numbers, found ", weights.size()));
  }
  std::vector<std::uint64_t> hits(trace.num_sequences() * predicted, 0);
  struct Scratch {
    Memory layer;
    Memory next;
  };
  std::vector<Scratch> scratch(static_cast<std::size_t>(pool.num_threads()));
  pool.parallel_for(hits.size(), [&](std::size_t item, int worker) {
    Scratch& own = scratch[static_cast<std::size_t>(worker)];
    const std::size_t s = item / predicted;
    const std::size_t layer = item % predicted;
    hits[item] = hits_of_previous_layer(trace.of_layer(s, layer, own.layer),
                                        trace.of_layer(s, layer + 1, own.next),
                                        weights.subspan(layer * table, table));
  });
  return hits;
}

}  // namespace moerun
