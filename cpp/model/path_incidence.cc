#include "model/path_incidence.h"

#include <bit>
#include <limits>

namespace moerun {
namespace {

template <typename Visit>
void for_each_bit(const RoutingPaths& paths, std::size_t sequence, const Visit& visit) {
  for (std::size_t w = 0; w < path_words(paths.num_bits); ++w) {
    for (std::uint64_t bits = paths.word(sequence, w); bits != 0; bits &= bits - 1) {
      visit(w * 64 + static_cast<std::size_t>(std::countr_zero(bits)));
    }
  }
}

}  // namespace

PathIncidence::PathIncidence(const RoutingPaths& paths, std::size_t smallest_batch) {
  const std::size_t num_sequences = paths.num_sequences;
  std::vector<std::uint32_t> num_users(paths.num_bits, 0);
  for (std::size_t i = 0; i < num_sequences; ++i) {
    for_each_bit(paths, i, [&](std::size_t bit) { ++num_users[bit]; });
  }
  constexpr std::uint32_t kLeftOut = std::numeric_limits<std::uint32_t>::max();
  std::vector<std::uint32_t> number(paths.num_bits, kLeftOut);
  first_user_.push_back(0);
  for (std::size_t bit = 0; bit < paths.num_bits; ++bit) {
    if (num_users[bit] < 2 || num_sequences - num_users[bit] < smallest_batch) continue;
    number[bit] = static_cast<std::uint32_t>(num_experts());
    first_user_.push_back(first_user_.back() + num_users[bit]);
  }
  users_.resize(first_user_.back());
  std::vector<std::size_t> next_user(first_user_.begin(), first_user_.end() - 1);
  first_expert_.push_back(0);
  for (std::size_t i = 0; i < num_sequences; ++i) {
    for_each_bit(paths, i, [&](std::size_t bit) {
      if (number[bit] == kLeftOut) return;
      experts_.push_back(number[bit]);
      users_[next_user[number[bit]]++] = static_cast<std::uint32_t>(i);
    });
    first_expert_.push_back(experts_.size());
  }
}

std::span<const std::uint32_t> PathIncidence::experts_of(std::size_t sequence) const {
  const std::size_t first = first_expert_[sequence];
  return std::span(experts_).subspan(first, first_expert_[sequence + 1] - first);
}

std::span<const std::uint32_t> PathIncidence::users_of(std::size_t expert) const {
  const std::size_t first = first_user_[expert];
  return std::span(users_).subspan(first, first_user_[expert + 1] - first);
}

}  // namespace moerun
