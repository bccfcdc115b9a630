// Hits of the live cache with every number of slots, from one replay of recorded routing.
//
// The rules are those of ExpertCache: all experts of a token are looked up first; then, in the
// router's order, each use is told to the policy and a missing expert takes an empty slot or the
// one of the policy's victim, never that of an expert of the same token. A first use is a miss.
//
// The policies are the live ones. Which of two experts one of them evicts depends on their uses
// alone, not on the number of slots; so SlotStack tells the contents of all caches, and one policy
// object serves them all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "base/thread_pool.h"
#include "expert/policy.h"
#include "metrics/routing_view.h"
#include "metrics/trace_view.h"
#include "replay/slot_stack.h"

namespace moerun {

class PolicyReplay {
 public:
  PolicyReplay(std::unique_ptr<CachePolicy> policy, std::size_t num_experts);

  // Experts of a prompt take slots that are empty, first come first served; the policy hears
  // nothing of it. Ids below num_experts.
  void fill(std::span<const std::uint16_t> experts);
  // A token decoded: its experts in the router's order, all different.
  void decode(std::span<const std::uint16_t> experts);
  void decode(const RoutingView& routing);

  // hits()[n]: lookups that n slots served, n = 0 ... num_experts.
  std::vector<std::uint64_t> hits() const;
  std::uint64_t num_lookups() const { return num_lookups_; }
  // Caches with more slots than this have it.
  std::uint32_t place_of(std::size_t expert) const { return stack_.place_of(expert); }
  // n slots hold the first n of these.
  std::span<const std::uint16_t> residents() const { return stack_.experts(); }

 private:
  std::unique_ptr<CachePolicy> policy_;
  SlotStack stack_;
  std::vector<std::uint64_t> hits_at_;  // at this number of slots and no less
  std::vector<std::uint16_t> served_;
  std::uint64_t num_lookups_ = 0;
};

// What no cache of n slots can beat, not even one that knows the future: at each n the most hits
// that any choice of what to keep and what not to take in at all gives (after Belady, 1966). The
// array is as PolicyReplay::hits. `before_token` (may be empty) is told of every token and of what
// the caches hold then.
std::vector<std::uint64_t> most_hits(
    const RoutingView& routing,
    const std::function<void(std::size_t token, const SlotStack&)>& before_token = {});

// Hits of each layer summed over sequences, (layers, num_experts + 1). `policy` is lru, lfu, lcp,
// or "optimal" for most_hits; InvalidArgument for another name. `restart`: every sequence starts
// with empty slots and a policy that has seen nothing; otherwise the trace's first alone, and the
// sequences follow one another. The trace is one that check_trace accepts.
std::vector<std::uint64_t> slot_hits(const TraceView& trace, std::string_view policy, bool restart,
                                     ThreadPool& pool);

}  // namespace moerun
