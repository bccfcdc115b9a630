#include "weights/host_experts.h"

#include <utility>

namespace moerun {

HostExperts::HostExperts(const ModelWeights& weights) {
  for (const LayerWeights& layer : weights.layers) {
    layers_.push_back({layer.bytes_per_expert(), 0, {}});
  }
}

void HostExperts::append(Layer& layer, std::byte* memory, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    layer.records.push_back(memory + i * layer.expert_bytes);
  }
}

void HostExperts::add_page_locked(std::size_t layer, std::size_t count, Backend& backend) {
  if (count == 0) return;
  Layer& to = layers_[layer];
  auto memory = backend.allocate(count * to.expert_bytes, "experts", MemoryUse::shared);
  append(to, memory->data(), count);
  to.num_page_locked += count;
  page_locked_.push_back({layer, count, std::move(memory)});
}

void HostExperts::add_pageable(std::size_t layer, std::size_t count) {
  if (count == 0) return;
  Layer& to = layers_[layer];
  pageable_.emplace_back(count * to.expert_bytes, "experts");
  append(to, pageable_.back().data(), count);
}

bool HostExperts::drop_last_page_locked() {
  if (page_locked_.empty()) return false;
  const Locked& last = page_locked_.back();
  Layer& layer = layers_[last.layer];
  layer.num_page_locked -= last.count;
  layer.records.resize(layer.num_page_locked);
  page_locked_.pop_back();
  return true;
}

std::size_t HostExperts::pageable_bytes() const {
  std::size_t bytes = 0;
  for (const HostMemory& memory : pageable_) bytes += memory.size();
  return bytes;
}

HostExperts::Place HostExperts::place_of(ExpertId id) const {
  const Layer& layer = layers_[id.layer];
  if (id.expert < layer.num_page_locked) return Place::page_locked;
  return id.expert < layer.records.size() ? Place::pageable : Place::file;
}

Bytes HostExperts::records_of(ExpertId id) const {
  const Layer& layer = layers_[id.layer];
  return {layer.records[id.expert], layer.expert_bytes};
}

}  // namespace moerun
