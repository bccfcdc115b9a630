#include "metrics/stack_replay.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace moerun {
namespace {

// What was used later counts for more; below it, the serial number of the last use breaks ties.
constexpr int kSerialBits = 40;
constexpr std::uint64_t kOne = std::uint64_t{1} << kSerialBits;

// Priorities as plain numbers, one an expert, kept up to date by each policy.
using Keys = std::vector<std::uint64_t>;

struct LruKeys {
  Keys keys;
  LruKeys(const RoutingView& routing, std::size_t) : keys(routing.num_experts, 0) {}
  void begin_token(std::size_t) {}
  void use(std::size_t expert, std::size_t serial) { keys[expert] = serial; }
};

struct LfuKeys {
  Keys keys;
  LfuKeys(const RoutingView& routing, std::size_t) : keys(routing.num_experts, 0) {}
  void begin_token(std::size_t) {}
  void use(std::size_t expert, std::size_t serial) {
    keys[expert] = (keys[expert] / kOne + 1) * kOne + serial;
  }
};

struct SchKeys {
  const RoutingView& routing;
  std::size_t segment_length;
  Keys keys;
  SchKeys(const RoutingView& all, std::size_t length)
      : routing(all), segment_length(length), keys(all.num_experts, 0) {
    for (std::size_t t = 0; t + 1 < length && t < routing.num_tokens(); ++t) enter(t);
  }
  void enter(std::size_t token) {
    for (const std::size_t expert : routing.token(token)) keys[expert] += kOne;
  }
  void begin_token(std::size_t token) {
    const std::size_t last = token + segment_length - 1;
    if (last < routing.num_tokens()) enter(last);
  }
  void use(std::size_t expert, std::size_t serial) {
    keys[expert] = (keys[expert] / kOne - 1) * kOne + serial;
  }
};

struct BeladyKeys {
  static constexpr std::uint64_t kNever = std::uint64_t{1} << 20;  // above all indices
  std::vector<std::size_t> next_use;                               // by serial - 1; 0: none
  Keys keys;
  BeladyKeys(const RoutingView& routing, std::size_t)
      : next_use(routing.expert_ids.size(), 0), keys(routing.num_experts, 0) {
    std::vector<std::size_t> later(routing.num_experts, 0);
    for (std::size_t i = routing.expert_ids.size(); i-- > 0;) {
      const std::size_t expert = routing.expert_ids[i];
      next_use[i] = later[expert];
      later[expert] = i + 1;
    }
  }
  void begin_token(std::size_t) {}
  void use(std::size_t expert, std::size_t serial) {
    const std::size_t next = next_use[serial - 1];
    keys[expert] = next == 0 ? kNever - expert : std::numeric_limits<std::uint64_t>::max() - next;
  }
};

template <typename PolicyKeys>
std::vector<std::uint64_t> replay(const RoutingView& routing, std::size_t segment_length) {
  PolicyKeys policy(routing, segment_length);
  const std::size_t num_experts = routing.num_experts;
  constexpr std::uint32_t kAbsent = std::numeric_limits<std::uint32_t>::max();
  std::vector<std::uint32_t> stack;                        // experts, the first c of capacity c
  std::vector<std::uint32_t> depth(num_experts, kAbsent);  // place in the stack
  std::vector<std::uint64_t> hits(num_experts + 1, 0);     // first: at exactly this depth
  stack.reserve(num_experts);
  std::size_t serial = 0;
  for (std::size_t t = 0; t < routing.num_tokens(); ++t) {
    policy.begin_token(t);
    const auto experts = routing.token(t);
    for (const std::size_t expert : experts) {
      if (depth[expert] != kAbsent) ++hits[depth[expert] + 1];
    }
    for (const std::size_t expert : experts) {
      std::size_t place = depth[expert];
      if (place == kAbsent) {
        place = stack.size();
        stack.push_back(static_cast<std::uint32_t>(expert));
        ++hits[place + 1];  // larger caches were still filling
      }
      // The expert goes on top; on the way down each capacity lets its lowest go.
      auto carried = static_cast<std::uint32_t>(expert);
      for (std::size_t i = 0; i < place; ++i) {
        if (i == 0 || policy.keys[stack[i]] < policy.keys[carried]) std::swap(carried, stack[i]);
        depth[stack[i]] = static_cast<std::uint32_t>(i);
      }
      stack[place] = carried;
      depth[carried] = static_cast<std::uint32_t>(place);
      policy.use(expert, ++serial);
    }
  }
  for (std::size_t c = 1; c <= num_experts; ++c) hits[c] += hits[c - 1];
  return hits;
}

}  // namespace

ReplayPolicy parse_replay_policy(std::string_view name) {
  if (name == "sch") return ReplayPolicy::sch;
  if (name == "lru") return ReplayPolicy::lru;
  if (name == "lfu") return ReplayPolicy::lfu;
  if (name == "belady") return ReplayPolicy::belady;
  throw InvalidArgument(message("policy: expected sch, lru, lfu or belady, found '", name, "'"));
}

std::vector<std::uint64_t> hits_by_capacity(const RoutingView& routing, ReplayPolicy policy,
                                            std::size_t segment_length) {
  if (segment_length == 0) {
    throw InvalidArgument("segment_length: expected at least 1, found 0");
  }
  switch (policy) {
    case ReplayPolicy::sch:
      return replay<SchKeys>(routing, segment_length);
    case ReplayPolicy::lru:
      return replay<LruKeys>(routing, segment_length);
    case ReplayPolicy::lfu:
      return replay<LfuKeys>(routing, segment_length);
    case ReplayPolicy::belady:
      break;
  }
  return replay<BeladyKeys>(routing, segment_length);
}

}  // namespace moerun
