#include "expert/host_memory_tiers.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/bytes_text.h"
#include "base/error.h"

namespace moerun {
namespace {

// Experts are page-locked in so many rounds over all layers: where one is refused, every layer has
// nearly the same share.
constexpr std::size_t kRounds = 8;
// Held back while experts take all there is: streams need some, too.
constexpr std::size_t kSlackBytes = std::size_t{4} << 20;

// Smaller ones work too, down to two blocks.
std::unique_ptr<DeviceBuffer> take_ring(HostPlan& plan, Backend& backend) {
  for (;;) {
    try {
      return backend.allocate(plan.ring_bytes(), "the ring for experts that are not page-locked",
                              MemoryUse::shared);
    } catch (const OutOfMemory&) {
      if (plan.ring_blocks <= 2) throw;
      plan.ring_blocks = std::max<std::size_t>(2, plan.ring_blocks / 2);
    }
  }
}

void page_lock(HostExperts& experts, const HostPlan& plan, Backend& backend) {
  for (std::size_t round = 1; round <= kRounds; ++round) {
    for (std::size_t layer = 0; layer < plan.layers.size(); ++layer) {
      const std::size_t upto = plan.layers[layer].page_locked * round / kRounds;
      experts.add_page_locked(layer, upto - experts.num_page_locked(layer), backend);
    }
  }
}

// Page-locked memory was refused: goes on with what there is.
void settle(HostMemoryTiers& tiers, const ModelWeights& weights, const ExpertCacheOptions& options,
            Backend& backend, const std::string& reason) {
  HostPlan& plan = tiers.plan;
  const std::size_t wanted = plan.page_locked_bytes;
  const std::size_t ring_blocks = plan.ring_blocks;
  const std::size_t block_bytes = plan.ring_block_bytes;
  for (;;) {
    for (std::size_t layer = 0; layer < plan.layers.size(); ++layer) {
      plan.layers[layer].page_locked = tiers.experts->num_page_locked(layer);
    }
    plan_the_rest(plan, weights, options);
    if (tiers.ring) {
      plan.ring_blocks = ring_blocks;
      plan.ring_block_bytes = block_bytes;
      break;
    }
    try {
      tiers.ring = take_ring(plan, backend);
      break;
    } catch (const OutOfMemory&) {
      if (!tiers.experts->drop_last_page_locked()) throw;
    }
  }
  plan.notes.push_back(message(
      "page-locked memory was refused (", reason, "): of ", bytes_text(wanted), " of experts ",
      bytes_text(plan.page_locked_bytes), " are page-locked; ", bytes_text(plan.pageable_bytes),
      " in pageable memory and ", bytes_text(plan.disk_bytes),
      " on disk are copied through a page-locked ring, which is slower. A smaller pin_limit asks "
      "for less; `ulimit -l` or the driver may bound what can be had"));
}

}  // namespace

HostMemoryTiers take_host_memory(const ModelWeights& weights, HostPlan plan,
                                 const ExpertCacheOptions& options, Backend& backend) {
  HostMemoryTiers tiers{std::move(plan), std::make_unique<HostExperts>(weights), nullptr};
  // Before the experts, which could leave nothing for it.
  if (tiers.plan.ring_blocks != 0) tiers.ring = take_ring(tiers.plan, backend);
  std::unique_ptr<DeviceBuffer> slack;
  try {
    slack = backend.allocate(kSlackBytes, "arguments of kernels", MemoryUse::shared);
    page_lock(*tiers.experts, tiers.plan, backend);
  } catch (const OutOfMemory& refused) {
    settle(tiers, weights, options, backend, refused.what());
  }
  for (std::size_t layer = 0; layer < tiers.plan.layers.size(); ++layer) {
    tiers.experts->add_pageable(layer, tiers.plan.layers[layer].pageable);
  }
  return tiers;
}

}  // namespace moerun
