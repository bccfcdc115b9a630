#include "runtime/cuda_backend.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "kernels/attention.h"
#include "kernels/embed.h"
#include "kernels/expert_sum.h"
#include "kernels/linear.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/router.h"
#include "kernels/segment_gemm.h"
#include "kernels/segment_gemv.h"
#include "kernels/sequence_list.h"
#include "runtime/cuda_copy_queue.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

// Up to so many tokens every segment is streamed once; more are grouped for the tensor cores.
constexpr std::size_t kFewExpertTokens = 8;

class CudaBuffer final : public DeviceBuffer {
 public:
  explicit CudaBuffer(DeviceMemory memory)
      : DeviceBuffer(memory.data(), memory.size()), memory_(std::move(memory)) {}

 private:
  DeviceMemory memory_;
};

CudaStream& own(Stream& stream) { return static_cast<CudaStream&>(stream); }

DeviceSegment as_device_segment(const Segment& segment, DType dtype) {
  return {segment.records.data(), static_cast<std::int32_t>(segment.expert),
          static_cast<std::int32_t>(segment.first_record),
          static_cast<std::int32_t>(segment.num_records), static_cast<std::int32_t>(dtype)};
}

void compute_many(CudaStream& stream, const DeviceSegment* segments, std::size_t num_segments,
                  std::size_t max_records) {
  const ExpertWork& work = stream.experts;
  const std::size_t bytes = grouping_bytes(work.shape, work.routing.tokens, work.routing.slots);
  compute_segments_many(stream.handle(), work, segments, num_segments, max_records,
                        stream.grouping(bytes), bytes);
}

// Calls body(run, first_row, num_rows) for what one launch takes of the sequences: several with one
// row each, or one with any number.
template <typename Body>
void for_runs(std::span<const SequenceRows> sequences, const Body& body) {
  std::size_t row = 0;
  while (!sequences.empty()) {
    std::size_t count = 0;
    while (count < std::min(sequences.size(), kMaxSequences) && sequences[count].num_rows == 1) {
      ++count;
    }
    count = std::max<std::size_t>(count, 1);
    const std::size_t rows = count == 1 ? sequences.front().num_rows : count;
    body(sequences.first(count), row, rows);
    sequences = sequences.subspan(count);
    row += rows;
  }
}

// So that scratch memory grows a few times only while the sequences do.
std::size_t rounded_length(std::span<const SequenceRows> sequences) {
  std::size_t length = 0;
  for (const SequenceRows& each : sequences) {
    const std::size_t end = each.first_position + 1;
    length = std::max(length, std::min(std::bit_ceil(end), each.kv.capacity));
  }
  return length;
}

class RecordedGraph final : public RecordedWork {
 public:
  RecordedGraph(CudaStream& stream, const std::function<void()>& issue)
      : stream_(stream), graph_(stream.handle()), generation_(stream.memory_generation()) {
    stream_.begin_recording();
    try {
      issue();
    } catch (...) {
      stream_.end_recording();
      throw;
    }
    stream_.end_recording();
    graph_.finish();
  }

  bool is_current() const override { return generation_ == stream_.memory_generation(); }
  void run() override { graph_.launch(); }

 private:
  CudaStream& stream_;
  DeviceGraph graph_;
  std::uint64_t generation_;
};

}  // namespace

std::unique_ptr<Stream> CudaBackend::make_stream() { return std::make_unique<CudaStream>(); }

std::unique_ptr<DeviceBuffer> CudaBackend::allocate(std::size_t bytes, std::string_view what,
                                                    MemoryUse use) {
  const auto place =
      use == MemoryUse::shared ? DeviceMemory::Place::pinned_host : DeviceMemory::Place::device;
  DeviceMemory memory(bytes, what, place);
  // Rows are read with their padding.
  if (use == MemoryUse::shared) {
    std::memset(memory.data(), 0, bytes);
  } else {
    fill_with_zeros(memory);
  }
  return std::make_unique<CudaBuffer>(std::move(memory));
}

void CudaBackend::copy(Stream& stream, std::byte* destination, const std::byte* source,
                       std::size_t bytes) {
  copy_async(own(stream).handle(), destination, source, bytes);
}

std::unique_ptr<CopyQueue> CudaBackend::make_copy_queue() {
  auto queue = std::make_unique<CudaCopyQueue>();
  copies_ = queue.get();
  return queue;
}

void CudaBackend::embed(Stream& stream, const MatrixView& table,
                        std::span<const std::int32_t> token_ids, float scale, Activations out) {
  const std::byte* staged = own(stream).stage(token_ids.data(), token_ids.size_bytes());
  cuda::embed(own(stream).handle(), table, reinterpret_cast<const std::int32_t*>(staged), scale,
              out);
}

void CudaBackend::norm(Stream& stream, const NormWeights& weights, Activations x, Activations out) {
  cuda::norm(own(stream).handle(), weights, x, out);
}

void CudaBackend::linear(Stream& stream, const LinearWeights& weights, Activations x, Activations y,
                         LinearOutput output) {
  cuda::linear(own(stream).handle(), weights, x, y, output,
               output.is_routing ? Precision::exact : Precision::tensor_cores);
}

void CudaBackend::rotate_and_store(Stream& stream, const AttentionShape& shape,
                                   const RotaryParams& rotary, Position first_position,
                                   Activations qkv, const KvLayer& kv) {
  cuda::rotate_and_store(own(stream).handle(), shape, rotary, first_position, qkv, kv);
}

void CudaBackend::attention(Stream& stream, const AttentionShape& shape,
                            const AttentionParams& params, Position first_position, Activations qkv,
                            const KvLayer& kv, Activations out) {
  const std::size_t bytes = attention_scratch_bytes(shape, qkv.rows, kv.capacity);
  float* scratch = own(stream).floats(bytes / sizeof(float));
  cuda::attention(own(stream).handle(), shape, params, first_position, qkv, kv, out, scratch,
                  bytes);
}

void CudaBackend::rotate_and_store_batch(Stream& stream, const AttentionShape& shape,
                                         const RotaryParams& rotary,
                                         std::span<const SequenceRows> sequences, Activations qkv) {
  check_sequences("rotate_and_store", sequences, qkv);
  for_runs(sequences, [&](std::span<const SequenceRows> run, std::size_t row, std::size_t rows) {
    const Activations own_qkv = qkv.slice(row, rows);
    if (run.size() == 1) {
      const SequenceRows& one = run.front();
      return rotate_and_store(stream, shape, rotary, one.first_position, own_qkv, one.kv);
    }
    rotate_and_store_each(own(stream).handle(), shape, rotary, run, own_qkv);
  });
}

void CudaBackend::attention_batch(Stream& stream, const AttentionShape& shape,
                                  const AttentionParams& params,
                                  std::span<const SequenceRows> sequences, Activations qkv,
                                  Activations out) {
  check_sequences("attention", sequences, qkv);
  for_runs(sequences, [&](std::span<const SequenceRows> run, std::size_t row, std::size_t rows) {
    const Activations own_qkv = qkv.slice(row, rows);
    const Activations own_out = out.slice(row, rows);
    if (run.size() == 1) {
      const SequenceRows& one = run.front();
      return attention(stream, shape, params, one.first_position, own_qkv, one.kv, own_out);
    }
    const std::size_t bytes = attention_each_scratch_bytes(shape, run.size(), rounded_length(run));
    float* scratch = own(stream).floats(bytes / sizeof(float));
    attention_each(own(stream).handle(), shape, params, run, own_qkv, own_out, scratch, bytes);
  });
}

void CudaBackend::route(Stream& stream, const RouterParams& params, Activations logits,
                        Routing routing) {
  cuda::route(own(stream).handle(), params, logits, routing);
}

void CudaBackend::route_shared(Stream& stream, const MatrixView& gate, std::int32_t shared_id,
                               Activations x, Routing routing) {
  cuda::route_shared(own(stream).handle(), gate, shared_id, x, routing);
}

void CudaBackend::choose_experts(Stream& stream, const RouterParams& params,
                                 std::span<const RouteRequest> requests) {
  const bool in_one = requests.size() <= kMaxRouters &&
                      std::all_of(requests.begin(), requests.end(), is_one_choice);
  if (in_one) return own(stream).choose_in_one(params, requests);
  Backend::choose_experts(stream, params, requests);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (requests[i].on_host.expert_ids != nullptr) own(stream).send_choice(i, requests[i]);
  }
}

void CudaBackend::wait_for_choice(Stream& stream, std::size_t index) {
  own(stream).wait_for_choice(index);
}

void CudaBackend::begin_experts(Stream& stream, const ExpertShape& shape, Activations x,
                                const Routing& routing) {
  const bool is_folded = routing.tokens > kFewExpertTokens;
  float* partials =
      own(stream).partials(partial_floats(shape, routing.tokens, routing.slots, is_folded));
  own(stream).experts = {shape, x, routing, partials, is_folded};
}

void CudaBackend::compute_segments(Stream& stream, std::span<const Segment> segments) {
  if (segments.empty()) return;
  const ExpertWork& work = own(stream).experts;
  std::vector<DeviceSegment> list;
  std::size_t max_records = 0;
  std::uint64_t waited_for = 0;  // segments of one expert came together
  for (const Segment& segment : segments) {
    list.push_back(as_device_segment(segment, work.shape.dtype_of(segment.expert)));
    max_records = std::max(max_records, segment.num_records);
    if (segment.ready != waited_for && segment.ready != 0) {
      copies_->make_wait(stream, segment.ready);
      waited_for = segment.ready;
    }
  }
  const auto* staged = reinterpret_cast<const DeviceSegment*>(
      own(stream).stage(list.data(), list.size() * sizeof(DeviceSegment)));
  if (work.routing.tokens <= kFewExpertTokens) {
    compute_segments_few(own(stream).handle(), work, staged, list.size(), max_records);
  } else {
    compute_many(own(stream), staged, list.size(), max_records);
  }
}

void CudaBackend::finish_experts(Stream& stream, float scale, Activations y) {
  sum_experts(own(stream).handle(), own(stream).experts, scale, y);
}

std::unique_ptr<DeviceBuffer> CudaBackend::make_expert_table(const ExpertShape& shape,
                                                             std::span<const Segment> experts) {
  std::vector<DeviceSegment> list;
  for (const Segment& expert : experts) {
    list.push_back(as_device_segment(expert, shape.dtype_of(expert.expert)));
  }
  const std::size_t bytes = list.size() * sizeof(DeviceSegment);
  auto table = allocate(bytes, "a table of experts", MemoryUse::streamed);
  CudaStream stream;
  copy_async(stream.handle(), table->data(), reinterpret_cast<const std::byte*>(list.data()),
             bytes);
  stream.synchronize();
  return table;
}

void CudaBackend::compute_all(Stream& stream, const DeviceBuffer& expert_table) {
  const ExpertWork& work = own(stream).experts;
  const auto* table = expert_table.as<DeviceSegment>();
  const std::size_t max_records =
      std::max(work.shape.intermediate_size, work.shape.shared_intermediate_size);
  if (work.routing.tokens <= kFewExpertTokens) {
    compute_experts_few(own(stream).handle(), work, table, max_records);
  } else {
    compute_many(own(stream), table, expert_table.size() / sizeof(DeviceSegment), max_records);
  }
}

void CudaBackend::embed_token(Stream& stream, const MatrixView& table, const std::int32_t* token_id,
                              float scale, Activations out) {
  cuda::embed(own(stream).handle(), table, token_id, scale, out);
}

std::unique_ptr<RecordedWork> CudaBackend::record(Stream& stream,
                                                  const std::function<void()>& issue) {
  return std::make_unique<RecordedGraph>(own(stream), issue);
}

MemoryState CudaBackend::memory() const { return device_memory(); }

std::size_t CudaBackend::scratch_bytes_for(const PassShape& shape) const {
  const std::size_t few = std::min(shape.tokens, kFewExpertTokens);
  const std::size_t sequences = std::min({shape.tokens, shape.sequences, kMaxSequences});
  std::size_t partials = 0;
  std::size_t grouping = 0;
  for (const auto& [experts, slots] : shape.layers) {
    partials = std::max(partials, partial_floats(experts, few, slots));
    if (shape.tokens == few) continue;
    partials = std::max(partials, partial_floats(experts, shape.tokens, slots, true));
    grouping = std::max(grouping, grouping_bytes(experts, shape.tokens, slots));
  }
  return CudaStream::kStagingBytes + partials * sizeof(float) + grouping +
         attention_each_scratch_bytes(shape.attention, sequences, shape.kv_capacity);
}

void CudaBackend::make_current() { use_device(device_); }

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
