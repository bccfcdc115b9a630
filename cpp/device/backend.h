// The interface of a compute device: memory, streams, and the operations of a decoder.
//
// Operations are issued to a stream and run in its order. The CPU backend has run them when the
// call returns; others may not have: what an operation reads must live until the stream has been
// synchronised. No operation allocates per call beyond the stream's own scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/thread_use.h"
#include "base/view.h"
#include "device/device_buffer.h"
#include "device/memory_state.h"
#include "device/op_params.h"

namespace moerun {

// An ordered queue of work, with the scratch memory its operations need.
class Stream {
 public:
  virtual ~Stream() = default;
  // Waits until everything issued so far has run.
  virtual void synchronize() = 0;
  virtual std::size_t scratch_bytes() const = 0;
};

class CopyQueue;

// Operations that were recorded once, to be issued again at the cost of one.
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  // False when memory that the operations use has been replaced: then it must not be run.
  virtual bool is_current() const = 0;
  // Issues them to the stream that they were recorded on.
  virtual void run() = 0;
};

// The largest pass that a stream will be used for.
struct PassShape {
  struct Layer {
    ExpertShape experts;
    std::size_t slots = 0;  // of a token
  };
  std::size_t tokens = 0;
  std::size_t sequences = 1;  // that the tokens belong to
  AttentionShape attention;
  std::size_t kv_capacity = 0;  // tokens, of a sequence
  std::vector<Layer> layers;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;
  virtual std::unique_ptr<Stream> make_stream() = 0;

  // Throws OutOfMemory saying `what` the memory was for. What operations take lies in such memory.
  virtual std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes, std::string_view what,
                                                 MemoryUse use) = 0;
  // Between memory of the device and of the host, or within either. The host's must live, and what
  // is copied to it is there, when the stream has been synchronised.
  virtual void copy(Stream& stream, std::byte* destination, const std::byte* source,
                    std::size_t bytes) = 0;
  // Whether the device computes in host memory, so that nothing has to be copied.
  virtual bool is_host() const = 0;
  // Null where is_host(): there is nothing to copy. One a backend; it must not outlive it.
  virtual std::unique_ptr<CopyQueue> make_copy_queue() = 0;

  // out[t] = scale * table[token_ids[t]]; ids are in range (the model checks them).
  virtual void embed(Stream& stream, const MatrixView& table,
                     std::span<const std::int32_t> token_ids, float scale, Activations out) = 0;

  // out[t] = norm(x[t])
  virtual void norm(Stream& stream, const NormWeights& weights, Activations x, Activations out) = 0;

  // y[t] (+)= scale * (W x[t] + bias)
  virtual void linear(Stream& stream, const LinearWeights& weights, Activations x, Activations y,
                      LinearOutput output) = 0;

  // Normalises, clamps (v too) and rotates q and k of qkv (tokens, (heads + 2 kv_heads) * head_dim)
  // in place, and writes k and v at positions first_position, ... of the KV cache.
  virtual void rotate_and_store(Stream& stream, const AttentionShape& shape,
                                const RotaryParams& rotary, Position first_position,
                                Activations qkv, const KvLayer& kv) = 0;

  // Causal attention of the q in qkv over the KV cache up to each token's own position.
  virtual void attention(Stream& stream, const AttentionShape& shape, const AttentionParams& params,
                         Position first_position, Activations qkv, const KvLayer& kv,
                         Activations out) = 0;

  // Both for several sequences, whose rows follow one another in qkv and out; the same bits.
  virtual void rotate_and_store_batch(Stream& stream, const AttentionShape& shape,
                                      const RotaryParams& rotary,
                                      std::span<const SequenceRows> sequences, Activations qkv);
  virtual void attention_batch(Stream& stream, const AttentionShape& shape,
                               const AttentionParams& params,
                               std::span<const SequenceRows> sequences, Activations qkv,
                               Activations out);

  // Fills the first top_k slots of every token: ids by falling score (of equals the lower id), and
  // weights. `logits`: (tokens, num_experts), the router's product. Where one of a token's is not
  // finite: ids 0, 1, ... and weights of NaN.
  virtual void route(Stream& stream, const RouterParams& params, Activations logits,
                     Routing routing) = 0;

  // Fills the last slot: the shared expert, weighted by sigmoid(gate . x), or by 1 without a gate.
  virtual void route_shared(Stream& stream, const MatrixView& gate, std::int32_t shared_id,
                            Activations x, Routing routing) = 0;

  // Norm, router, choice and shared expert of every request, as norm(), linear(), route() and
  // route_shared() do it.
  virtual void choose_experts(Stream& stream, const RouterParams& params,
                              std::span<const RouteRequest> requests);
  // Waits until request `index` of the last choose_experts() is in its `on_host`, but not for what
  // was issued to the stream afterwards.
  virtual void wait_for_choice(Stream& stream, std::size_t index);

  // The experts of a layer: begin, then compute_segments as often as segments become available,
  // then finish. Every expert in the routing must be covered exactly once; segments of one expert
  // come in rising order of records, but any cut, and any order among experts, gives the same bits.
  virtual void begin_experts(Stream& stream, const ExpertShape& shape, Activations x,
                             const Routing& routing) = 0;
  virtual void compute_segments(Stream& stream, std::span<const Segment> segments) = 0;
  // y[t] += scale * sum over slots s of weight(t, s) * expert(t, s), in slot order.
  virtual void finish_experts(Stream& stream, float scale, Activations y) = 0;

  // For a device that can go through a pass without the host in between: null if it cannot.
  // compute_all() takes the place of compute_segments() where every expert of the layer is
  // resident; `experts` holds each whole, in the order of their ids.
  virtual std::unique_ptr<DeviceBuffer> make_expert_table(const ExpertShape& shape,
                                                          std::span<const Segment> experts);
  virtual void compute_all(Stream& stream, const DeviceBuffer& expert_table);
  // As embed() of one token, whose id lies on the device.
  virtual void embed_token(Stream& stream, const MatrixView& table, const std::int32_t* token_id,
                           float scale, Activations out);
  // What `issue` issues to the stream is not run but recorded. It may not wait for anything, nor
  // give operations something to take from the host. All of it must have been issued once before.
  virtual std::unique_ptr<RecordedWork> record(Stream& stream, const std::function<void()>& issue);

  // Of the threads that compute; nothing where these are not the host's.
  virtual ThreadUse thread_use() const { return {}; }

  // Of the device: what allocate() takes from, but for MemoryUse::shared.
  virtual MemoryState memory() const = 0;
  // Scratch memory that a stream will have taken from it after such passes; 0 where the memory is
  // the host's, which gives as much as is used.
  virtual std::size_t scratch_bytes_for(const PassShape&) const { return 0; }
  // To be called on every thread before it uses the device: others may have chosen another one
  // there.
  virtual void make_current() {}

 protected:
  // Throws InvalidArgument unless the sequences have as many rows as there are, and room for their
  // keys and values.
  static void check_sequences(std::string_view operation, std::span<const SequenceRows> sequences,
                              const Activations& rows);
};

// Threads: how many share the work, the caller's included. `kernels`: a name for
// choose_cpu_kernels().
std::unique_ptr<Backend> make_cpu_backend(int threads, std::string_view kernels);

}  // namespace moerun
