// The operations of a decoder on a CUDA device, or on the host's stand-in for one.
#pragma once

#include <memory>
#include <string_view>

#include "device/backend.h"
#include "runtime/cuda_stream.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::string_view name, int device) : name_(name), device_(device) {}

  std::string_view name() const override { return name_; }
  std::unique_ptr<Stream> make_stream() override;
  std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes, std::string_view what,
                                         MemoryUse use) override;
  void copy(Stream& stream, std::byte* destination, const std::byte* source,
            std::size_t bytes) override;
  bool is_host() const override { return false; }
  std::unique_ptr<CopyQueue> make_copy_queue() override;

  void embed(Stream& stream, const MatrixView& table, std::span<const std::int32_t> token_ids,
             float scale, Activations out) override;
  void norm(Stream& stream, const NormWeights& weights, Activations x, Activations out) override;
  void linear(Stream& stream, const LinearWeights& weights, Activations x, Activations y,
              LinearOutput output) override;
  void rotate_and_store(Stream& stream, const AttentionShape& shape, const RotaryParams& rotary,
                        Position first_position, Activations qkv, const KvLayer& kv) override;
  void attention(Stream& stream, const AttentionShape& shape, const AttentionParams& params,
                 Position first_position, Activations qkv, const KvLayer& kv,
                 Activations out) override;
  void rotate_and_store_batch(Stream& stream, const AttentionShape& shape,
                              const RotaryParams& rotary, std::span<const SequenceRows> sequences,
                              Activations qkv) override;
  void attention_batch(Stream& stream, const AttentionShape& shape, const AttentionParams& params,
                       std::span<const SequenceRows> sequences, Activations qkv,
                       Activations out) override;
  void route(Stream& stream, const RouterParams& params, Activations logits,
             Routing routing) override;
  void route_shared(Stream& stream, const MatrixView& gate, std::int32_t shared_id, Activations x,
                    Routing routing) override;
  void choose_experts(Stream& stream, const RouterParams& params,
                      std::span<const RouteRequest> requests) override;
  void wait_for_choice(Stream& stream, std::size_t index) override;
  void begin_experts(Stream& stream, const ExpertShape& shape, Activations x,
                     const Routing& routing) override;
  void compute_segments(Stream& stream, std::span<const Segment> segments) override;
  void finish_experts(Stream& stream, float scale, Activations y) override;

  std::unique_ptr<DeviceBuffer> make_expert_table(const ExpertShape& shape,
                                                  std::span<const Segment> experts) override;
  void compute_all(Stream& stream, const DeviceBuffer& expert_table) override;
  void embed_token(Stream& stream, const MatrixView& table, const std::int32_t* token_id,
                   float scale, Activations out) override;
  std::unique_ptr<RecordedWork> record(Stream& stream, const std::function<void()>& issue) override;

  MemoryState memory() const override;
  std::size_t scratch_bytes_for(const PassShape& shape) const override;
  void make_current() override;

 private:
  std::string_view name_;
  int device_;
  CopyQueue* copies_ = nullptr;  // owned by who asked for it
};

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
