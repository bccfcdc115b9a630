#include "metrics/stack_replay.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/error.h"

namespace moerun {
namespace {

// An expert with its priority, in one number: the policy's count (20 bits), then the serial number
// of a use (28 bits), then the expert (16 bits). Larger ones stay.
using Entry = std::uint64_t;
constexpr int kExpertBits = 16;
constexpr int kSerialBits = 28;
constexpr Entry kSerialOne = Entry{1} << kExpertBits;
constexpr Entry kCountOne = kSerialOne << kSerialBits;
constexpr std::size_t kMaxSerial = (std::size_t{1} << kSerialBits) - 1;
constexpr std::size_t kMaxCount = (std::size_t{1} << (64 - kSerialBits - kExpertBits)) - 1;

constexpr std::size_t expert_of(Entry entry) { return entry % kSerialOne; }

// Experts from the one that every cache holds down. Those that were never used are not in it.
class Stack {
 public:
  explicit Stack(std::size_t num_experts) : place_(num_experts, kAbsent) {
    entries_.reserve(num_experts);
  }

  static constexpr std::uint32_t kAbsent = std::numeric_limits<std::uint32_t>::max();
  std::uint32_t place_of(std::size_t expert) const { return place_[expert]; }
  std::size_t size() const { return entries_.size(); }
  void raise(std::size_t expert) {
    if (place_[expert] != kAbsent) entries_[place_[expert]] += kCountOne;
  }

  // Puts an expert on top; on the way down each capacity lets its lowest go.
  void put_on_top(Entry entry) {
    std::uint32_t last = place_[expert_of(entry)];
    if (last == kAbsent) {
      last = static_cast<std::uint32_t>(entries_.size());
      entries_.push_back(entry);
    }
    Entry carried = std::exchange(entries_[0], entry);
    place_[expert_of(entry)] = 0;
    if (last == 0) return;
    for (std::uint32_t i = 1; i < last; ++i) {
      // Both sides without a branch: which one it is cannot be foretold.
      const Entry here = entries_[i];
      const Entry stays = std::max(here, carried);
      carried = std::min(here, carried);
      entries_[i] = stays;
      place_[expert_of(stays)] = i;
    }
    entries_[last] = carried;
    place_[expert_of(carried)] = last;
  }

 private:
  std::vector<Entry> entries_;
  std::vector<std::uint32_t> place_;  // of each expert
};

// Each policy says what an expert is worth once it has been used.
struct Lru {
  Lru(const RoutingView&, std::size_t) {}
  void begin_token(std::size_t, Stack&) {}
  Entry use(std::size_t expert, std::size_t serial) { return serial * kSerialOne + expert; }
};

struct Lfu {
  std::vector<Entry> counts;
  Lfu(const RoutingView& routing, std::size_t) : counts(routing.num_experts, 0) {}
  void begin_token(std::size_t, Stack&) {}
  Entry use(std::size_t expert, std::size_t serial) {
    return ++counts[expert] * kCountOne + serial * kSerialOne + expert;
  }
};

struct Sch {
  const RoutingView& routing;
  std::size_t segment_length;
  std::vector<Entry> coming;  // in the segment, the current token's that are served left out
  Sch(const RoutingView& all, std::size_t length)
      : routing(all), segment_length(length), coming(all.num_experts, 0) {
    for (std::size_t t = 0; t + 1 < length && t < routing.num_tokens(); ++t) {
      for (const std::size_t expert : routing.token(t)) ++coming[expert];
    }
  }
  void begin_token(std::size_t token, Stack& stack) {
    const std::size_t last = token + segment_length - 1;
    if (last >= routing.num_tokens()) return;
    for (const std::size_t expert : routing.token(last)) {
      ++coming[expert];
      stack.raise(expert);
    }
  }
  Entry use(std::size_t expert, std::size_t serial) {
    return --coming[expert] * kCountOne + serial * kSerialOne + expert;
  }
};

struct Belady {
  std::vector<std::size_t> next_use;  // by serial number - 1; 0: none
  Belady(const RoutingView& routing, std::size_t) : next_use(routing.expert_ids.size(), 0) {
    std::vector<std::size_t> later(routing.num_experts, 0);
    for (std::size_t i = routing.expert_ids.size(); i-- > 0;) {
      const std::size_t expert = routing.expert_ids[i];
      next_use[i] = later[expert];
      later[expert] = i + 1;
    }
  }
  void begin_token(std::size_t, Stack&) {}
  Entry use(std::size_t expert, std::size_t serial) {
    const std::size_t next = next_use[serial - 1];
    // Those never used again are worth less than all others, of them the higher index less.
    if (next == 0) return (kSerialOne - 1 - expert) * kSerialOne + expert;
    return kCountOne + (kMaxSerial - next) * kSerialOne + expert;
  }
};

template <typename Policy>
std::vector<std::uint64_t> replay(const RoutingView& routing, std::size_t segment_length) {
  Policy policy(routing, segment_length);
  Stack stack(routing.num_experts);
  std::vector<std::uint64_t> hits(routing.num_experts + 1, 0);  // first: at exactly this depth
  std::size_t serial = 0;
  for (std::size_t t = 0; t < routing.num_tokens(); ++t) {
    policy.begin_token(t, stack);
    const auto experts = routing.token(t);
    for (const std::size_t expert : experts) {
      if (stack.place_of(expert) != Stack::kAbsent) ++hits[stack.place_of(expert) + 1];
    }
    for (const std::size_t expert : experts) {
      // A first use is a hit in the caches that were still filling.
      if (stack.place_of(expert) == Stack::kAbsent) ++hits[stack.size() + 1];
      stack.put_on_top(policy.use(expert, ++serial));
    }
  }
  for (std::size_t c = 1; c <= routing.num_experts; ++c) hits[c] += hits[c - 1];
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
  if (routing.expert_ids.size() > kMaxSerial || routing.num_tokens() > kMaxCount) {
    throw InvalidArgument(message("a sequence of ", routing.num_tokens(), " tokens with ",
                                  routing.slots, " experts each is too long to be replayed: at ",
                                  "most ", kMaxCount, " tokens and ", kMaxSerial, " activations"));
  }
  switch (policy) {
    case ReplayPolicy::sch:
      return replay<Sch>(routing, segment_length);
    case ReplayPolicy::lru:
      return replay<Lru>(routing, segment_length);
    case ReplayPolicy::lfu:
      return replay<Lfu>(routing, segment_length);
    case ReplayPolicy::belady:
      break;
  }
  return replay<Belady>(routing, segment_length);
}

}  // namespace moerun
