// The metrics of routing over many sequences at once, on all cores. All of them want a trace that
// check_trace accepts; sums over sequences are the caller's, for intervals resample sequences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "metrics/srp.h"
#include "metrics/stack_replay.h"
#include "metrics/trace_view.h"

namespace moerun {

// Window counts of each layer: (sequences, layers, segment_length + 1).
std::vector<std::uint64_t> layer_histograms(const TraceView& trace, std::size_t segment_length,
                                            ThreadPool& pool);

// Window counts of each expert, summed over sequences: (layers, num_experts, segment_length + 1).
std::vector<std::uint64_t> expert_histograms(const TraceView& trace, std::size_t segment_length,
                                             ThreadPool& pool);

// The same for one layer, sequences apart: (sequences, num_experts, segment_length + 1).
std::vector<std::uint32_t> expert_histograms_by_sequence(const TraceView& trace, std::size_t layer,
                                                         std::size_t segment_length,
                                                         ThreadPool& pool);

// Hits at every capacity: (sequences, layers, num_experts + 1), or of one pool over all layers
// (sequences, 1, layers * num_experts + 1).
std::vector<std::uint64_t> replay_hits(const TraceView& trace, ReplayPolicy policy,
                                       std::size_t segment_length, bool one_pool, ThreadPool& pool);

// Activations of each expert: (sequences, layers, num_experts).
std::vector<std::uint64_t> num_activations(const TraceView& trace, ThreadPool& pool);

// sum_of_deviations: (sequences, layers).
std::vector<double> window_deviations(const TraceView& trace, std::size_t segment_length,
                                      ThreadPool& pool);

// hits_of_previous_token: (sequences, layers).
std::vector<std::uint64_t> previous_token_hits(const TraceView& trace, ThreadPool& pool);

// count_pairs summed over sequences: (layers - 1, num_experts, num_experts).
std::vector<std::uint64_t> layer_pairs(const TraceView& trace, ThreadPool& pool);

// hits_of_previous_layer: (sequences, layers - 1); `weights` as layer_pairs.
std::vector<std::uint64_t> previous_layer_hits(const TraceView& trace,
                                               std::span<const float> weights, ThreadPool& pool);

}  // namespace moerun
