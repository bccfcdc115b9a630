// Which expert of a layer gives up its slot. Policies know ids and the order of events; no memory,
// no clocks, no files: the live cache and the simulator run the same objects.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moerun {

// One object a layer. Per token: begin_token, then access for every active expert in the router's
// order, each access followed by evict and insert where the expert was missing.
class CachePolicy {
 public:
  virtual ~CachePolicy() = default;

  void begin_token() { ++token_; }
  // The expert is used by the current token, resident or not.
  void access(std::size_t expert);
  // The expert to evict among `candidates` (at least one, all resident).
  virtual std::size_t victim(std::span<const std::size_t> candidates) const = 0;
  // Whether an expert that was missed gets a slot at all.
  virtual bool admits(std::size_t expert) const;

  bool has_seen(std::size_t expert) const { return uses_[expert].count != 0; }
  // Takes over what another policy of the same layer has seen.
  void inherit(const CachePolicy& other);

 protected:
  explicit CachePolicy(std::size_t num_experts) : uses_(num_experts) {}

  struct Use {
    std::uint64_t count = 0;   // activations so far; outlives eviction
    std::uint64_t token = 0;   // of the last one
    std::uint64_t serial = 0;  // of the last one among all accesses: equal for no two
  };
  const Use& use_of(std::size_t expert) const { return uses_[expert]; }
  std::uint64_t token() const { return token_; }
  // The one with the lowest key; of equals the least recently used, then the higher index.
  template <typename Key>
  std::size_t lowest(std::span<const std::size_t> candidates, Key&& key) const;

 private:
  std::vector<Use> uses_;
  std::uint64_t token_ = 0;
  std::uint64_t serial_ = 0;
};

struct PolicyParams {
  // lcp: priority = count * rho^(tokens since the last use / omega) (MoEpic, section on caching)
  double rho = 0.25;
  double omega = 128;
  std::vector<std::size_t> static_experts;  // of static: the only ones that get slots
};

// The order in which `policy` would let them go, backwards.
std::vector<std::size_t> most_valued_first(const CachePolicy& policy,
                                           std::vector<std::size_t> experts);

// "lru", "lfu", "lcp", "static"
const std::vector<std::string>& cache_policy_names();

// InvalidArgument for another name.
std::unique_ptr<CachePolicy> make_cache_policy(std::string_view name, std::size_t num_experts,
                                               const PolicyParams& params = {});

}  // namespace moerun
