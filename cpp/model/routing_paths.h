// Which experts sequences are predicted to use at their next token: their paths, as sets of bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace moerun {

// One row of words for each sequence, the i-th from words[i * pitch] on. Bit b of a row is bit
// b % 64 of its word b / 64, and stands for expert b % num_experts of the layer b / num_experts,
// layers without experts not counted. Bits from num_bits on, and words after them, do not matter.
struct RoutingPaths {
  std::span<const std::uint64_t> words;
  std::size_t num_sequences = 0;
  std::size_t num_bits = 0;  // layers x experts of a layer
  std::size_t pitch = 0;     // words from a row to the next, at least path_words(num_bits)

  // Of a row, without the bits that do not matter; index < path_words(num_bits).
  std::uint64_t word(std::size_t sequence, std::size_t index) const;
};

// That a row of so many bits takes.
std::size_t path_words(std::size_t num_bits);

// InvalidArgument for fewer words than rows and pitch need, or a pitch less than a row needs.
void check_paths(const RoutingPaths& paths);

// Makes `path` the set of the `top_k` likeliest experts of each layer; of equally likely ones, the
// lower index. `probabilities`: (layers, num_experts), or anything that rises with them.
// InvalidArgument for one that is not a number, for sizes that are no whole layers, top_k above
// num_experts, or a path of too few words.
void set_likeliest(std::span<const float> probabilities, std::size_t num_experts, std::size_t top_k,
                   std::span<std::uint64_t> path);

// Makes `path` the set of the experts `ids` (layers, any number a layer), each below num_experts.
// InvalidArgument for an id that is not, for ids that cannot be divided among so many layers, or a
// path of too few words.
void set_experts(std::span<const std::int32_t> ids, std::size_t num_layers, std::size_t num_experts,
                 std::span<std::uint64_t> path);

// Experts of all layers that at least one of `sequences` is predicted to use: what a step that
// computes these sequences together has to have in fast memory.
// InvalidArgument for what check_paths refuses, and for a sequence that there is not.
std::size_t num_active_experts(const RoutingPaths& paths, std::span<const std::size_t> sequences);

}  // namespace moerun
