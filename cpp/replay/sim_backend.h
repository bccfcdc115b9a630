// A device that only takes address space: memory of any size, of which nothing is ever touched.
#pragma once

#include "device/backend.h"
#include "device/copy_queue.h"

namespace moerun {

// For an ExpertCache that is simulated. Copies do nothing; what computes throws InvalidArgument.
class SimBackend final : public Backend {
 public:
  std::string_view name() const override { return "simulated"; }
  std::unique_ptr<Stream> make_stream() override;
  std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes, std::string_view what,
                                         MemoryUse use) override;
  void copy(Stream&, std::byte*, const std::byte*, std::size_t) override {}
  bool is_host() const override { return true; }
  std::unique_ptr<CopyQueue> make_copy_queue() override { return nullptr; }

  void embed(Stream&, const MatrixView&, std::span<const std::int32_t>, float,
             Activations) override;
  void norm(Stream&, const NormWeights&, Activations, Activations) override;
  void linear(Stream&, const LinearWeights&, Activations, Activations, LinearOutput) override;
  void rotate_and_store(Stream&, const AttentionShape&, const RotaryParams&, Position, Activations,
                        const KvLayer&) override;
  void attention(Stream&, const AttentionShape&, const AttentionParams&, Position, Activations,
                 const KvLayer&, Activations) override;
  void route(Stream&, const RouterParams&, Activations, Routing) override;
  void route_shared(Stream&, const MatrixView&, std::int32_t, Activations, Routing) override;
  void begin_experts(Stream&, const ExpertShape&, Activations, const Routing&) override;
  void compute_segments(Stream&, std::span<const Segment>) override;
  void finish_experts(Stream&, float, Activations) override;

  MemoryState memory() const override;
};

}  // namespace moerun
