// A cache configuration from a file.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace moerun {

struct PlannedLayer {
  std::size_t layer = 0;
  std::size_t num_slots = 0;
  double split = 0;
  std::vector<std::size_t> experts;  // of the policy "static"
  std::vector<std::size_t> warm;     // read into slots at once, the best first
};

struct CachePlan {
  std::string policy;
  std::string prefetch;  // empty: not given
  std::size_t budget_bytes = 0;
  bool is_resident = false;  // every expert in memory
  std::vector<PlannedLayer> layers;
};

// Reads {"version": 1, "policy": ..., "budget_bytes": ..., "layers": [...]}. FileError,
// FormatError.
CachePlan read_cache_plan(const std::string& path);
// The same of a text; `name` stands for it in messages.
CachePlan parse_cache_plan(const std::string& text, const std::string& name);

}  // namespace moerun
