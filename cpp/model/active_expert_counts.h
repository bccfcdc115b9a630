// How many experts of a layer the tokens of a step use together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace moerun {

// One thread writes, any may ask.
class ActiveExpertCounts {
 public:
  struct Snapshot {
    std::uint64_t steps = 0;
    std::vector<std::uint64_t> of_layers;  // active experts, summed over the steps
  };

  explicit ActiveExpertCounts(std::size_t num_layers) { counts_.of_layers.resize(num_layers); }

  // `of_layers`: routed experts that the step used, of each layer with experts.
  void add_step(const std::vector<std::size_t>& of_layers) {
    const std::lock_guard lock(mutex_);
    ++counts_.steps;
    for (std::size_t i = 0; i < of_layers.size(); ++i) counts_.of_layers[i] += of_layers[i];
  }

  Snapshot snapshot() const {
    const std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  mutable std::mutex mutex_;
  Snapshot counts_;
};

}  // namespace moerun
