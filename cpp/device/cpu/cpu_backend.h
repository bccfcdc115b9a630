// The CPU as a device: a thread pool, a kernel set, and the operations in terms of both.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "base/host_memory.h"
#include "base/thread_pool.h"
#include "device/backend.h"
#include "device/copy_queue.h"
#include "device/cpu/expert_batch.h"
#include "device/cpu/kernel_table.h"
#include "device/cpu/sequence_items.h"

namespace moerun {

// Runs what it is given at once, on the pool; owns the scratch memory of the operations.
class CpuStream final : public Stream {
 public:
  explicit CpuStream(int num_threads);

  void synchronize() override {}
  std::size_t scratch_bytes() const override;

  std::byte* kernel_scratch(int worker) {
    return kernel_scratch_[static_cast<std::size_t>(worker)].data();
  }
  // Memory for `count` floats of one worker, kept and grown between calls.
  float* worker_floats(int worker, std::size_t count);
  ExpertBatch& experts() { return experts_; }
  SequenceItems& sequence_items() { return sequence_items_; }

 private:
  std::vector<HostMemory> kernel_scratch_;
  std::vector<HostMemory> worker_floats_;
  ExpertBatch experts_;
  SequenceItems sequence_items_;
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, const CpuKernels& kernels) : kernels_(kernels), pool_(threads) {}

  std::string_view name() const override { return "cpu"; }
  std::unique_ptr<Stream> make_stream() override;
  std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes, std::string_view what,
                                         MemoryUse use) override;
  void copy(Stream& stream, std::byte* destination, const std::byte* source,
            std::size_t bytes) override;
  bool is_host() const override { return true; }
  std::unique_ptr<CopyQueue> make_copy_queue() override { return nullptr; }

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
  void begin_experts(Stream& stream, const ExpertShape& shape, Activations x,
                     const Routing& routing) override;
  void compute_segments(Stream& stream, std::span<const Segment> segments) override;
  void finish_experts(Stream& stream, float scale, Activations y) override;

  ThreadUse thread_use() const override { return pool_.use(); }
  MemoryState memory() const override { return {available_memory_bytes(), total_memory_bytes()}; }

 private:
  // Queries of one sequence that share a KV head.
  struct QueryBlock {
    std::size_t kv_head;
    std::size_t first_head;
    std::size_t last_head;  // the one behind, as below
    std::size_t first_token;
    std::size_t last_token;
  };

  // `q`: a row of q, k and v.
  void rotate_row(CpuStream& stream, int worker, const AttentionShape& shape,
                  const RotaryParams& rotary, std::size_t position, float* q, const KvLayer& kv);
  // qkv and out are those of the sequence.
  void attend(CpuStream& stream, int worker, const AttentionShape& shape,
              const AttentionParams& params, const SequenceRows& sequence, const QueryBlock& block,
              Activations qkv, Activations out);

  const CpuKernels& kernels_;
  ThreadPool pool_;
};

}  // namespace moerun
