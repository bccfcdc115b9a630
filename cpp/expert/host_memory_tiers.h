// The host's memory behind the expert cache of a device, as it was planned or as it could be had.
#pragma once

#include <cstddef>
#include <memory>

#include "device/backend.h"
#include "expert/host_plan.h"
#include "weights/host_experts.h"

namespace moerun {

struct HostMemoryTiers {
  HostPlan plan;  // as it came out
  std::unique_ptr<HostExperts> experts;
  std::unique_ptr<DeviceBuffer> ring;  // null: every expert is page-locked
};

// Takes the memory that the plan wants. Where page-locked memory is refused, the rest lies where
// the plan's tier puts what is not page-locked, and the plan gets a note of it. OutOfMemory where
// not even the smallest ring can be had.
HostMemoryTiers take_host_memory(const ModelWeights& weights, HostPlan plan,
                                 const ExpertCacheOptions& options, Backend& backend);

}  // namespace moerun
