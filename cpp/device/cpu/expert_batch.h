// One layer's experts on the CPU: who needs which expert, and the partial sums on their way to y.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/host_memory.h"
#include "base/thread_pool.h"
#include "device/cpu/kernel_table.h"
#include "device/op_params.h"

namespace moerun {

class CpuStream;

// A pair is one (token, slot): a token's use of one expert. Sums are kept per pair, so that they
// are added in slot order however the experts came. With few pairs, every quantum has a sum of its
// own and all threads work on one expert; with many, a thread takes an expert (or a part of its
// tokens) through all its quanta and keeps one sum. Both give the same bits.
class ExpertBatch {
 public:
  void begin(const ExpertShape& shape, Activations x, const Routing& routing);
  void compute(ThreadPool& pool, const CpuKernels& kernels, CpuStream& stream,
               std::span<const Segment> segments);
  void finish(ThreadPool& pool, const CpuKernels& kernels, float scale, Activations y);

  std::size_t scratch_bytes() const { return sums_.size(); }

 private:
  // Tokens of one expert within one segment, or with few pairs within a few quanta of it.
  struct Item {
    const Segment* segment;
    std::size_t first_record;  // within the expert
    std::size_t num_records;
    std::size_t first_pair;  // into pairs_of_expert_
    std::size_t num_pairs;
  };

  void run_items(ThreadPool& pool, const CpuKernels& kernels, CpuStream& stream,
                 std::span<const Segment> segments);
  LoopWork work_of(std::span<const Segment> segments) const;
  void list_items(std::span<const Segment> segments, std::size_t num_threads);
  void add_items(const Segment& segment, std::size_t first_record, std::size_t num_records);
  void compute_item(const Item& item, const CpuKernels& kernels, std::byte* scratch);
  float* sum(std::size_t pair, std::size_t quantum) const;

  ExpertShape shape_;
  Activations x_;
  Routing routing_;
  std::size_t pitch_ = 0;
  bool sums_per_quantum_ = false;
  HostMemory sums_;
  std::vector<std::size_t> sum_offset_;      // (slots + 1) quanta before each slot, one token
  std::vector<std::size_t> num_folded_;      // by expert: quanta that the first of its sums holds
  std::vector<std::uint32_t> expert_begin_;  // (num_experts + 2) into pairs_of_expert_
  std::vector<std::uint32_t> pairs_of_expert_;  // pairs, by expert
  std::vector<Item> items_;
};

}  // namespace moerun
