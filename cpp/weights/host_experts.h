// Routed experts that the host keeps for a device, which computes with copies of them.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "base/expert_id.h"
#include "base/host_memory.h"
#include "base/view.h"
#include "device/backend.h"
#include "weights/model_weights.h"

namespace moerun {

// Of every layer the first experts are page-locked, so that the device copies them by itself; the
// next ones lie in pageable memory, and the others stay in their files.
class HostExperts {
 public:
  enum class Place { page_locked, pageable, file };

  explicit HostExperts(const ModelWeights& weights);

  // Memory for the next so many experts of a layer; page-locked ones first. OutOfMemory, also where
  // only page-locked memory is refused.
  void add_page_locked(std::size_t layer, std::size_t count, Backend& backend);
  void add_pageable(std::size_t layer, std::size_t count);
  // Takes back what add_page_locked() added last, before any pageable memory; false: nothing left.
  bool drop_last_page_locked();

  std::size_t num_page_locked(std::size_t layer) const { return layers_[layer].num_page_locked; }
  std::size_t pageable_bytes() const;

  Place place_of(ExpertId id) const;
  // Of an expert that is not in its file. ModelWeights::load fills them.
  Bytes records_of(ExpertId id) const;

 private:
  struct Layer {
    std::size_t expert_bytes = 0;
    std::size_t num_page_locked = 0;
    std::vector<std::byte*> records;  // of the experts in memory
  };
  struct Locked {
    std::size_t layer;
    std::size_t count;
    std::unique_ptr<DeviceBuffer> memory;
  };
  void append(Layer& layer, std::byte* memory, std::size_t count);

  std::vector<Layer> layers_;
  std::vector<Locked> page_locked_;
  std::vector<HostMemory> pageable_;
};

}  // namespace moerun
