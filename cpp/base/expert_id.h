// Which expert: a decoder layer and the router's index in it.
#pragma once

#include <cstddef>

namespace moerun {

struct ExpertId {
  std::size_t layer = 0;
  std::size_t expert = 0;

  bool operator==(const ExpertId&) const = default;
};

}  // namespace moerun
