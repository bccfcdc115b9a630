// Where the host keeps the experts that a device copies: page-locked, pageable, or on disk.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "expert/cache_layout.h"
#include "weights/model_weights.h"

namespace moerun {

enum class HostTier {
  automatic,  // what is not page-locked is in memory as far as it fits, else on disk
  memory,     // all of it in memory
  disk,       // all of it on disk
};

std::string_view name_of(HostTier tier);

// Experts of one layer: the first ones page-locked, then the pageable ones; the others on disk.
struct HostShare {
  std::size_t page_locked = 0;
  std::size_t pageable = 0;
};

struct HostPlan {
  HostTier tier = HostTier::automatic;
  std::size_t pin_limit_bytes = 0;  // as asked for, or what the tier takes by itself
  std::size_t usable_bytes = 0;     // of memory, for experts in all
  std::vector<HostShare> layers;    // by layer
  std::size_t page_locked_bytes = 0;
  std::size_t pageable_bytes = 0;
  std::size_t disk_bytes = 0;
  // The page-locked ring through which go experts that are not; none where all are.
  std::size_t ring_block_bytes = 0;
  std::size_t ring_blocks = 0;
  std::vector<std::string> notes;  // what a user did not ask for

  std::size_t ring_bytes() const { return ring_blocks * ring_block_bytes; }
};

// Everything is page-locked as far as memory and the limit go, the same share of every layer. Of
// `available_bytes`, the memory that is free, the weights that pass through it are left, and a
// tenth, at least 256 MiB. Throws InvalidArgument for options that are out of range, OutOfMemory
// where HostTier::memory does not fit.
HostPlan plan_host_memory(const ModelWeights& weights, const ExpertCacheOptions& options,
                          std::size_t available_bytes);

// Throws InvalidArgument for options that are out of range.
void check_host_options(const ModelWeights& weights, const ExpertCacheOptions& options);

// Plans anew what is not page-locked, after HostShare::page_locked has changed.
void plan_the_rest(HostPlan& plan, const ModelWeights& weights, const ExpertCacheOptions& options);

}  // namespace moerun
