#include "model/path_medoids.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace moerun {
namespace {

constexpr std::size_t kMaxRounds = 8;
constexpr std::size_t kMaxSteps = 1'500'000;
constexpr std::uint32_t kFar = std::numeric_limits<std::uint32_t>::max();

std::vector<std::size_t> farthest_first(const PathDistances& distances, std::size_t count,
                                        std::size_t first) {
  std::vector<std::size_t> medoids = {first};
  std::vector<std::uint32_t> nearest(distances.num_sequences(), kFar);
  while (medoids.size() < count) {
    for (std::size_t i = 0; i < nearest.size(); ++i) {
      nearest[i] = std::min(nearest[i], distances(i, medoids.back()));
    }
    std::size_t next = nearest.size();
    for (std::size_t i = 0; i < nearest.size(); ++i) {
      if (std::find(medoids.begin(), medoids.end(), i) != medoids.end()) continue;
      if (next == nearest.size() || nearest[i] > nearest[next]) next = i;
    }
    medoids.push_back(next);
  }
  return medoids;
}

std::vector<std::uint32_t> assign_to(const std::vector<std::size_t>& medoids,
                                     const PathDistances& distances,
                                     std::span<const std::size_t> sizes) {
  const std::size_t num_sequences = distances.num_sequences();
  // How much nearer the nearest medoid is than the second.
  std::vector<std::uint32_t> preference(num_sequences, 0);
  for (std::size_t i = 0; i < num_sequences; ++i) {
    std::uint32_t nearest = kFar;
    std::uint32_t second = kFar;
    for (const std::size_t medoid : medoids) {
      const std::uint32_t distance = distances(i, medoid);
      second = std::min(second, std::max(nearest, distance));
      nearest = std::min(nearest, distance);
    }
    preference[i] = second - nearest;
  }
  std::vector<std::uint32_t> order(num_sequences);
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return preference[a] > preference[b]; });
  std::vector<std::size_t> room(sizes.begin(), sizes.end());
  std::vector<std::uint32_t> batch_of(num_sequences, 0);
  for (const std::uint32_t i : order) {
    std::size_t best = sizes.size();
    for (std::size_t g = 0; g < sizes.size(); ++g) {
      if (room[g] == 0) continue;
      if (best == sizes.size() || distances(i, medoids[g]) < distances(i, medoids[best])) best = g;
    }
    --room[best];
    batch_of[i] = static_cast<std::uint32_t>(best);
  }
  return batch_of;
}

std::vector<std::size_t> medoids_of(const std::vector<std::uint32_t>& batch_of,
                                    const PathDistances& distances, std::size_t num_batches) {
  const std::size_t num_sequences = batch_of.size();
  std::vector<std::size_t> medoids(num_batches, num_sequences);
  std::vector<std::uint64_t> least(num_batches, 0);
  for (std::size_t i = 0; i < num_sequences; ++i) {
    std::uint64_t sum = 0;
    for (std::size_t j = 0; j < num_sequences; ++j) {
      if (batch_of[j] == batch_of[i]) sum += distances(i, j);
    }
    const std::uint32_t batch = batch_of[i];
    if (medoids[batch] == num_sequences || sum < least[batch]) {
      medoids[batch] = i;
      least[batch] = sum;
    }
  }
  return medoids;
}

}  // namespace

PathDistances::PathDistances(const PathIncidence& paths, WorkBudget& work)
    : num_sequences_(paths.num_sequences()), distances_(num_sequences_ * num_sequences_, 0) {
  std::size_t all_steps = 0;
  for (std::size_t e = 0; e < paths.num_experts(); ++e) {
    const std::size_t users = paths.users_of(e).size();
    all_steps += users * users / 2;
  }
  const std::size_t stride = 1 + all_steps / kMaxSteps;
  std::vector<std::uint32_t> sizes(num_sequences_, 0);
  // First how many experts two sequences share: an expert adds 1 to every pair of its users.
  for (std::size_t e = 0; e < paths.num_experts(); e += stride) {
    const auto users = paths.users_of(e);
    work.spend(users.size() * users.size() / 2);
    for (std::size_t n = 0; n < users.size(); ++n) {
      ++sizes[users[n]];
      std::uint32_t* shared = distances_.data() + users[n] * num_sequences_;
      for (const std::uint32_t other : users.subspan(n + 1)) ++shared[other];
    }
  }
  for (std::size_t i = 0; i < num_sequences_; ++i) {
    for (std::size_t j = i + 1; j < num_sequences_; ++j) {
      const std::uint32_t shared = distances_[i * num_sequences_ + j];
      const std::uint32_t distance = sizes[i] + sizes[j] - 2 * shared;
      distances_[i * num_sequences_ + j] = distance;
      distances_[j * num_sequences_ + i] = distance;
    }
  }
  work.spend(num_sequences_ * num_sequences_);
}

std::vector<std::uint32_t> medoid_batches(const PathDistances& distances,
                                          std::span<const std::size_t> sizes, std::size_t first,
                                          WorkBudget& work) {
  std::vector<std::size_t> medoids = farthest_first(distances, sizes.size(), first);
  std::vector<std::uint32_t> batch_of = assign_to(medoids, distances, sizes);
  for (std::size_t round = 1; round < kMaxRounds && !work.is_spent(); ++round) {
    work.spend(batch_of.size() * batch_of.size());
    const auto next = medoids_of(batch_of, distances, sizes.size());
    if (next == medoids) break;
    medoids = next;
    batch_of = assign_to(medoids, distances, sizes);
  }
  return batch_of;
}

std::size_t outermost(const PathDistances& distances) {
  std::size_t found = 0;
  std::uint32_t farthest = 0;
  for (std::size_t i = 0; i < distances.num_sequences(); ++i) {
    for (std::size_t j = i + 1; j < distances.num_sequences(); ++j) {
      if (distances(i, j) > farthest) {
        farthest = distances(i, j);
        found = i;
      }
    }
  }
  return found;
}

}  // namespace moerun
