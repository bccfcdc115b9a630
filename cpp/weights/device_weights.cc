// Moving weights to a device: copies every block of memory, then points every view at the copy.
#include <map>
#include <utility>

#include "base/error.h"
#include "weights/model_weights.h"

namespace moerun {
namespace {

// From an address in a block of the host to the same place in its copy.
class Relocation {
 public:
  void add(const void* from, std::size_t bytes, std::byte* to) {
    blocks_[static_cast<const std::byte*>(from)] = {bytes, to};
  }

  template <typename T>
  void apply(const T*& pointer) const {
    if (pointer == nullptr) return;
    const auto* address = reinterpret_cast<const std::byte*>(pointer);
    auto block = blocks_.upper_bound(address);
    if (block == blocks_.begin() || address >= (--block)->first + block->second.bytes) {
      throw Error("a view of a weight points into no block of weights");
    }
    pointer = reinterpret_cast<const T*>(block->second.to + (address - block->first));
  }
  void apply(NormWeights& norm) const {
    apply(norm.weight);
    apply(norm.bias);
  }
  void apply(LinearWeights& linear) const {
    apply(linear.weight.data);
    apply(linear.bias);
  }

 private:
  struct Target {
    std::size_t bytes;
    std::byte* to;
  };
  std::map<const std::byte*, Target> blocks_;
};

}  // namespace

void ModelWeights::move_to(Backend& backend, Stream& stream) {
  Relocation relocation;
  const auto copy = [&](const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    device_memory_.push_back(backend.allocate(bytes, "weights", MemoryUse::streamed));
    backend.copy(stream, device_memory_.back()->data(), static_cast<const std::byte*>(from), bytes);
    relocation.add(from, bytes, device_memory_.back()->data());
  };
  for (const HostMemory& block : memory_) copy(block.data(), block.size());
  for (const auto& vector : vectors_) copy(vector.data(), vector.size() * sizeof(float));
  stream.synchronize();

  relocation.apply(embedding.data);
  relocation.apply(final_norm);
  relocation.apply(lm_head);
  for (LayerWeights& layer : layers) {
    for (NormWeights* norm :
         {&layer.input_norm, &layer.q_norm, &layer.k_norm, &layer.post_attention_norm}) {
      relocation.apply(*norm);
    }
    relocation.apply(layer.qkv);
    relocation.apply(layer.o_proj);
    for (MatrixView* matrix :
         {&layer.router, &layer.shared_gate, &layer.expert_records, &layer.shared_records}) {
      relocation.apply(matrix->data);
    }
  }
  memory_.clear();
  vectors_.clear();
}

}  // namespace moerun
