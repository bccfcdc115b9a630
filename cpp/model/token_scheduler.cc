#include "model/token_scheduler.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "base/error.h"
#include "model/batch_swaps.h"
#include "model/path_incidence.h"
#include "model/path_medoids.h"
#include "model/work_budget.h"

namespace moerun {
namespace {

// Some milliseconds together. The second part is kept for the last price, so that every start ends
// where no swap helps, however much there is to do before.
constexpr std::size_t kWork = 3'000'000;
constexpr std::size_t kLastWork = 1'000'000;
// Of few sequences every start is cheap and may matter; of 32, sixteen starts find in seven times
// the time what is a thousandth better than one.
constexpr std::size_t kMaxStarts = 16;
constexpr std::size_t kMinStarts = 2;
constexpr std::size_t kStartsOfOne = 160;

// What each further user of an expert in a batch costs, as a part of what the one before does; in
// the end nothing, and the price is the number of active experts. That number alone is a poor
// guide: in a large batch nearly every expert has several users, and no single swap changes it.
struct Part {
  std::int64_t numerator;
  std::int64_t denominator;
};
constexpr Part kParts[] = {{1, 2}, {1, 4}, {0, 1}};
constexpr std::int64_t kFirstPrice = std::int64_t{1} << 30;

std::vector<std::int64_t> prices(Part part, std::size_t count) {
  std::vector<std::int64_t> price(count, kFirstPrice);
  for (std::size_t n = 1; n < count; ++n) {
    price[n] = price[n - 1] * part.numerator / part.denominator;
  }
  return price;
}

void check_sizes(const RoutingPaths& paths, std::span<const std::size_t> sizes) {
  if (paths.num_sequences > kMaxWaiting) {
    throw InvalidArgument(message("paths: expected at most ", kMaxWaiting, " sequences, found ",
                                  paths.num_sequences));
  }
  if (sizes.size() > kMaxBatches) {
    throw InvalidArgument(
        message("sizes: expected at most ", kMaxBatches, " batches, found ", sizes.size()));
  }
  if (paths.num_bits > std::numeric_limits<std::uint32_t>::max() - 1) {
    throw InvalidArgument(
        message("paths: expected fewer than 2^32 experts, found ", paths.num_bits));
  }
  std::size_t left = paths.num_sequences;
  for (const std::size_t size : sizes) {
    if (size > left) {
      throw InvalidArgument(message("sizes: expected a sum of ", paths.num_sequences,
                                    ", one place for each sequence, found more"));
    }
    left -= size;
  }
  if (left != 0) {
    throw InvalidArgument(message("sizes: expected a sum of ", paths.num_sequences,
                                  ", one place for each sequence, found ",
                                  paths.num_sequences - left));
  }
}

class BatchSearch {
 public:
  BatchSearch(const RoutingPaths& paths, std::span<const std::size_t> sizes)
      : sizes_(sizes.begin(), sizes.end()),
        paths_(paths, *std::min_element(sizes.begin(), sizes.end())),
        swaps_(paths_, sizes.size()),
        work_(kWork),
        last_work_(kLastWork) {
    for (std::uint32_t g = 0; g < sizes.size(); ++g) best_.insert(best_.end(), sizes[g], g);
    swaps_.assign(best_);
    least_ = swaps_.num_active();
    for (const Part part : kParts) prices_.push_back(prices(part, best_.size() + 1));
  }

  // The batch of each sequence.
  const std::vector<std::uint32_t>& find() {
    const PathDistances distances(paths_, work_);
    const std::size_t num_sequences = best_.size();
    const std::vector<std::uint32_t> arrival = best_;
    const std::size_t num_starts = std::clamp(kStartsOfOne / num_sequences, kMinStarts, kMaxStarts);
    for (std::size_t start = 0; start < num_starts && !work_.is_spent(); ++start) {
      const std::size_t first =
          start == 0 ? outermost(distances) : start * num_sequences / num_starts;
      search_from(medoid_batches(distances, sizes_, first, work_));
      if (start == 0) search_from(arrival);
    }
    return best_;
  }

 private:
  void search_from(const std::vector<std::uint32_t>& batch_of) {
    swaps_.assign(batch_of);
    keep_if_better();
    for (const auto& price : prices_) {
      swaps_.refine(price, &price == &prices_.back() ? last_work_ : work_);
    }
    keep_if_better();
  }

  void keep_if_better() {
    const std::size_t active = swaps_.num_active();
    if (active >= least_) return;
    least_ = active;
    best_.assign(swaps_.batch_of().begin(), swaps_.batch_of().end());
  }

  std::vector<std::size_t> sizes_;
  PathIncidence paths_;
  BatchSwaps swaps_;
  WorkBudget work_;
  WorkBudget last_work_;
  std::vector<std::vector<std::int64_t>> prices_;  // the last: of the number of active experts
  std::vector<std::uint32_t> best_;
  std::size_t least_ = 0;
};

}  // namespace

std::vector<std::vector<std::size_t>> split_batches(const RoutingPaths& paths,
                                                    std::span<const std::size_t> sizes) {
  check_paths(paths);
  check_sizes(paths, sizes);
  std::vector<std::size_t> batches;  // those with room
  std::vector<std::size_t> sizes_of;
  for (std::size_t g = 0; g < sizes.size(); ++g) {
    if (sizes[g] == 0) continue;
    batches.push_back(g);
    sizes_of.push_back(sizes[g]);
  }
  std::vector<std::vector<std::size_t>> result(sizes.size());
  if (batches.empty()) return result;
  BatchSearch search(paths, sizes_of);
  const std::vector<std::uint32_t>& batch_of = search.find();
  for (std::size_t i = 0; i < batch_of.size(); ++i) result[batches[batch_of[i]]].push_back(i);
  // A batch of the same size whose first sequence waits longer takes the place before.
  for (std::size_t g = 0; g < result.size(); ++g) {
    for (std::size_t h = g + 1; h < result.size(); ++h) {
      if (sizes[g] == 0 || sizes[h] != sizes[g]) continue;
      if (result[h].front() < result[g].front()) std::swap(result[g], result[h]);
    }
  }
  return result;
}

}  // namespace moerun
