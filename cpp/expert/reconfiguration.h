// What ExpertCache::reconfigure did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moerun {

struct Reconfiguration {
  struct Layer {
    std::size_t layer = 0;
    std::size_t slots_before = 0;
    std::size_t slots = 0;
    double split_before = 0;
    double split = 0;
    std::size_t kept = 0;     // experts that stayed in slots
    std::size_t dropped = 0;  // that did not
    std::size_t warmed = 0;   // that were read into empty slots
  };
  std::vector<Layer> layers;
  std::uint64_t bytes_read = 0;
};

}  // namespace moerun
