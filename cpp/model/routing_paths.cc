#include "model/routing_paths.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/error.h"

namespace moerun {
namespace {

constexpr std::size_t kWordBits = 64;

void set_bit(std::span<std::uint64_t> path, std::size_t bit) {
  path[bit / kWordBits] |= std::uint64_t{1} << (bit % kWordBits);
}

void clear_path(std::span<std::uint64_t> path, std::size_t num_layers, std::size_t num_experts) {
  if (num_experts != 0 && num_layers > std::numeric_limits<std::size_t>::max() / num_experts) {
    throw InvalidArgument(message("path: expected fewer bits than the address space, found ",
                                  num_layers, " layers of ", num_experts, " experts"));
  }
  const std::size_t needed = path_words(num_layers * num_experts);
  if (path.size() < needed) {
    throw InvalidArgument(message("path: expected at least ", needed, " words for ", num_layers,
                                  " layers of ", num_experts, " experts, found ", path.size()));
  }
  std::fill(path.begin(), path.end(), 0);
}

}  // namespace

std::size_t path_words(std::size_t num_bits) {
  return num_bits / kWordBits + (num_bits % kWordBits != 0 ? 1 : 0);
}

std::uint64_t RoutingPaths::word(std::size_t sequence, std::size_t index) const {
  const std::uint64_t bits = words[sequence * pitch + index];
  const std::size_t in_last = num_bits % kWordBits;
  const bool is_cut = in_last != 0 && index == num_bits / kWordBits;
  return is_cut ? bits & ((std::uint64_t{1} << in_last) - 1) : bits;
}

void check_paths(const RoutingPaths& paths) {
  const std::size_t needed = path_words(paths.num_bits);
  if (paths.pitch < needed) {
    throw InvalidArgument(message("paths: expected a pitch of at least ", needed, " words for ",
                                  paths.num_bits, " experts, found ", paths.pitch));
  }
  if (paths.pitch != 0 && paths.num_sequences > paths.words.size() / paths.pitch) {
    throw InvalidArgument(message("paths: expected ", paths.num_sequences, " rows of ", paths.pitch,
                                  " words, found ", paths.words.size(), " words in all"));
  }
}

void set_likeliest(std::span<const float> probabilities, std::size_t num_experts, std::size_t top_k,
                   std::span<std::uint64_t> path) {
  if (num_experts == 0 ? !probabilities.empty() : probabilities.size() % num_experts != 0) {
    throw InvalidArgument(message("probabilities: expected ", num_experts,
                                  " for each layer, found ", probabilities.size(), " in all"));
  }
  if (top_k > num_experts) {
    throw InvalidArgument(
        message("top_k: expected at most the ", num_experts, " experts of a layer, found ", top_k));
  }
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    if (std::isnan(probabilities[i])) {
      throw InvalidArgument(message("probabilities: that of expert ", i % num_experts, " in layer ",
                                    i / num_experts, " is not a number"));
    }
  }
  const std::size_t num_layers = num_experts == 0 ? 0 : probabilities.size() / num_experts;
  clear_path(path, num_layers, num_experts);
  if (top_k == 0) return;
  std::vector<std::uint32_t> order(num_experts);
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    const float* likely = probabilities.data() + layer * num_experts;
    std::iota(order.begin(), order.end(), 0u);
    std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(top_k - 1),
                     order.end(), [likely](std::uint32_t a, std::uint32_t b) {
                       return likely[a] != likely[b] ? likely[a] > likely[b] : a < b;
                     });
    for (std::size_t n = 0; n < top_k; ++n) set_bit(path, layer * num_experts + order[n]);
  }
}

void set_experts(std::span<const std::int32_t> ids, std::size_t num_layers, std::size_t num_experts,
                 std::span<std::uint64_t> path) {
  if (num_layers == 0 ? !ids.empty() : ids.size() % num_layers != 0) {
    throw InvalidArgument(message("ids: expected equally many for each of ", num_layers,
                                  " layers, found ", ids.size(), " in all"));
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || static_cast<std::size_t>(ids[i]) >= num_experts) {
      throw InvalidArgument(message("ids: expected experts from 0 to below ", num_experts,
                                    ", found ", ids[i], " in layer ",
                                    i / (ids.size() / num_layers)));
    }
  }
  clear_path(path, num_layers, num_experts);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::size_t layer = i / (ids.size() / num_layers);
    set_bit(path, layer * num_experts + static_cast<std::size_t>(ids[i]));
  }
}

std::size_t num_active_experts(const RoutingPaths& paths, std::span<const std::size_t> sequences) {
  check_paths(paths);
  for (const std::size_t sequence : sequences) {
    if (sequence >= paths.num_sequences) {
      throw InvalidArgument(
          message("sequences: expected indices below ", paths.num_sequences, ", found ", sequence));
    }
  }
  std::size_t count = 0;
  for (std::size_t w = 0; w < path_words(paths.num_bits); ++w) {
    std::uint64_t used = 0;
    for (const std::size_t sequence : sequences) used |= paths.word(sequence, w);
    count += static_cast<std::size_t>(std::popcount(used));
  }
  return count;
}

}  // namespace moerun
