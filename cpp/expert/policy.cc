#include "expert/policy.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace moerun {

void CachePolicy::access(std::size_t expert) {
  Use& use = uses_[expert];
  ++use.count;
  use.token = token_;
  use.serial = ++serial_;
}

bool CachePolicy::admits(std::size_t) const { return true; }

void CachePolicy::inherit(const CachePolicy& other) {
  uses_ = other.uses_;
  token_ = other.token_;
  serial_ = other.serial_;
}

std::vector<std::size_t> most_valued_first(const CachePolicy& policy,
                                           std::vector<std::size_t> experts) {
  for (std::size_t left = experts.size(); left > 1; --left) {
    const std::size_t victim = policy.victim({experts.data(), left});
    *std::find(experts.begin(), experts.end(), victim) = experts[left - 1];
    experts[left - 1] = victim;
  }
  return experts;
}

template <typename Key>
std::size_t CachePolicy::lowest(std::span<const std::size_t> candidates, Key&& key) const {
  std::size_t best = candidates.front();
  for (const std::size_t expert : candidates.subspan(1)) {
    const auto mine = key(expert);
    const auto best_key = key(best);
    const std::uint64_t age = uses_[expert].serial;
    const std::uint64_t best_age = uses_[best].serial;
    if (mine < best_key ||
        (mine == best_key && (age < best_age || (age == best_age && expert > best)))) {
      best = expert;
    }
  }
  return best;
}

namespace {

class LruPolicy : public CachePolicy {
 public:
  explicit LruPolicy(std::size_t num_experts) : CachePolicy(num_experts) {}
  std::size_t victim(std::span<const std::size_t> candidates) const override {
    return lowest(candidates, [](std::size_t) { return 0; });
  }
};

class LfuPolicy : public CachePolicy {
 public:
  explicit LfuPolicy(std::size_t num_experts) : CachePolicy(num_experts) {}
  std::size_t victim(std::span<const std::size_t> candidates) const override {
    return lowest(candidates, [this](std::size_t expert) { return use_of(expert).count; });
  }
};

// "Least cache priority": frequency that fades with the time since the last use.
class LcpPolicy : public CachePolicy {
 public:
  LcpPolicy(std::size_t num_experts, double rho, double omega)
      : CachePolicy(num_experts), rho_(rho), omega_(omega) {}
  std::size_t victim(std::span<const std::size_t> candidates) const override {
    return lowest(candidates, [this](std::size_t expert) {
      const auto& use = use_of(expert);
      const auto idle = static_cast<double>(token() - use.token);
      return static_cast<double>(use.count) * std::pow(rho_, idle / omega_);
    });
  }

 private:
  double rho_;
  double omega_;
};

class StaticPolicy : public CachePolicy {
 public:
  StaticPolicy(std::size_t num_experts, std::span<const std::size_t> chosen)
      : CachePolicy(num_experts), chosen_(num_experts, false) {
    for (const std::size_t expert : chosen) chosen_[expert] = true;
  }
  bool admits(std::size_t expert) const override { return chosen_[expert]; }
  std::size_t victim(std::span<const std::size_t> candidates) const override {
    return lowest(candidates, [](std::size_t) { return 0; });
  }

 private:
  std::vector<bool> chosen_;
};

}  // namespace

const std::vector<std::string>& cache_policy_names() {
  static const std::vector<std::string> names = {"lru", "lfu", "lcp", "static"};
  return names;
}

std::unique_ptr<CachePolicy> make_cache_policy(std::string_view name, std::size_t num_experts,
                                               const PolicyParams& params) {
  if (name == "lru") return std::make_unique<LruPolicy>(num_experts);
  if (name == "lfu") return std::make_unique<LfuPolicy>(num_experts);
  if (name == "lcp") return std::make_unique<LcpPolicy>(num_experts, params.rho, params.omega);
  if (name == "static") {
    for (const std::size_t expert : params.static_experts) {
      if (expert >= num_experts) {
        throw InvalidArgument(message("static policy: expected experts from 0 to ", num_experts - 1,
                                      ", found ", expert));
      }
    }
    return std::make_unique<StaticPolicy>(num_experts, params.static_experts);
  }
  throw InvalidArgument(
      message("policy: expected off, lru, lfu, lcp or static, found '", name, "'"));
}

}  // namespace moerun
