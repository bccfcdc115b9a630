#include "device/cpu/expert_batch.h"

#include <algorithm>

#include "base/error.h"
#include "device/cpu/cpu_backend.h"

namespace moerun {
namespace {

// Up to this many pairs, sums are kept per quantum: for one token of any known model, and for small
// batches. Above, there are enough experts at work to occupy the threads whole.
constexpr std::size_t kFewPairs = 32;

// Of quanta with sums of their own, how many a thread takes at a time, and in how many goes.
constexpr std::size_t kMaxRun = 8;
constexpr std::size_t kRunsPerThread = 4;

// Most sums were written by other threads: fetching them from there takes as long as from memory.
void prefetch(const float* x, std::size_t n) {
  for (std::size_t i = 0; i < n; i += 64 / sizeof(float)) __builtin_prefetch(x + i);
}

std::size_t num_quanta(std::size_t records) {
  return (records + kQuantumRecords - 1) / kQuantumRecords;
}

}  // namespace

void ExpertBatch::begin(const ExpertShape& shape, Activations x, const Routing& routing) {
  shape_ = shape;
  x_ = x;
  routing_ = routing;
  pitch_ = padded(shape.hidden_size);
  sums_per_quantum_ = routing.num_pairs() <= kFewPairs;

  // Counting sort of the pairs by expert; the order within an expert is that of the tokens.
  const std::size_t num_ids = shape.num_experts + 1;
  expert_begin_.assign(num_ids + 1, 0);
  for (std::size_t pair = 0; pair < routing.num_pairs(); ++pair) {
    ++expert_begin_[static_cast<std::size_t>(routing.expert_ids[pair]) + 1];
  }
  for (std::size_t id = 0; id < num_ids; ++id) expert_begin_[id + 1] += expert_begin_[id];
  pairs_of_expert_.resize(routing.num_pairs());
  std::vector<std::uint32_t> next(expert_begin_.begin(), expert_begin_.end() - 1);
  for (std::size_t pair = 0; pair < routing.num_pairs(); ++pair) {
    const auto id = static_cast<std::size_t>(routing.expert_ids[pair]);
    pairs_of_expert_[next[id]++] = static_cast<std::uint32_t>(pair);
  }

  num_folded_.assign(num_ids, 1);
  sum_offset_.assign(routing.slots + 1, 0);
  for (std::size_t slot = 0; slot < routing.slots; ++slot) {
    // A slot holds either always the shared expert or always a routed one.
    const auto id = static_cast<std::size_t>(routing.expert_ids[slot]);
    const std::size_t sums = sums_per_quantum_ ? num_quanta(shape.num_records(id)) : 1;
    sum_offset_[slot + 1] = sum_offset_[slot] + sums;
  }
  const std::size_t bytes = routing.tokens * sum_offset_.back() * pitch_ * sizeof(float);
  if (bytes > sums_.size()) sums_ = HostMemory(bytes, "partial sums of experts");
}

float* ExpertBatch::sum(std::size_t pair, std::size_t quantum) const {
  const std::size_t token = pair / routing_.slots;
  const std::size_t slot = pair % routing_.slots;
  const std::size_t index =
      token * sum_offset_.back() + sum_offset_[slot] + (sums_per_quantum_ ? quantum : 0);
  return sums_.as<float>() + index * pitch_;
}

void ExpertBatch::list_items(std::span<const Segment> segments, std::size_t num_threads) {
  items_.clear();
  if (!sums_per_quantum_) {
    for (const Segment& segment : segments)
      add_items(segment, segment.first_record, segment.num_records);
    // The largest first, or the last one alone would keep the other threads waiting.
    std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) {
      return a.num_pairs * a.num_records > b.num_pairs * b.num_records;
    });
    return;
  }
  // Long runs read memory faster, and one that starts an expert needs only one sum; short ones
  // share out better. So first come long runs from the start of every expert, then what is left.
  std::size_t quanta = 0;
  for (const Segment& segment : segments) quanta += num_quanta(segment.num_records);
  const std::size_t run =
      std::clamp<std::size_t>(quanta / (kRunsPerThread * num_threads), 1, kMaxRun);
  const std::size_t long_run = std::max(run, quanta / (2 * num_threads));
  const auto first_run_of = [&](const Segment& segment) {
    if (segment.first_record != 0) return std::size_t{0};
    const std::size_t most = num_quanta(segment.num_records) * 3 / 4;
    return std::min(segment.num_records, kQuantumRecords * std::max(run, std::min(long_run, most)));
  };
  for (const Segment& segment : segments) {
    const std::size_t records = first_run_of(segment);
    if (records == 0) continue;
    num_folded_[segment.expert] = num_quanta(records);
    add_items(segment, 0, records);
  }
  for (const Segment& segment : segments) {
    const std::size_t end = segment.first_record + segment.num_records;
    for (std::size_t record = segment.first_record + first_run_of(segment); record < end;
         record += run * kQuantumRecords) {
      add_items(segment, record, std::min(run * kQuantumRecords, end - record));
    }
  }
}

void ExpertBatch::add_items(const Segment& segment, std::size_t first_record,
                            std::size_t num_records) {
  const std::size_t end = expert_begin_[segment.expert + 1];
  for (std::size_t pair = expert_begin_[segment.expert]; pair < end; pair += kMaxTokens) {
    items_.push_back({&segment, first_record, num_records, pair, std::min(kMaxTokens, end - pair)});
  }
}

void ExpertBatch::compute(ThreadPool& pool, const CpuKernels& kernels, CpuStream& stream,
                          std::span<const Segment> segments) {
  if (!sums_per_quantum_) {
    // Two segments of one expert share a sum, so they may not run side by side: one loop each run
    // of segments in which every expert is new.
    std::size_t first = 0;
    std::vector<std::uint8_t> seen(shape_.num_experts + 1, 0);
    for (std::size_t i = 0; i <= segments.size(); ++i) {
      if (i < segments.size() && !seen[segments[i].expert]) {
        seen[segments[i].expert] = 1;
        continue;
      }
      run_items(pool, kernels, stream, segments.subspan(first, i - first));
      if (i == segments.size()) return;
      std::fill(seen.begin(), seen.end(), std::uint8_t{0});
      seen[segments[i].expert] = 1;
      first = i;
    }
  }
  run_items(pool, kernels, stream, segments);
}

void ExpertBatch::run_items(ThreadPool& pool, const CpuKernels& kernels, CpuStream& stream,
                            std::span<const Segment> segments) {
  const LoopWork work = work_of(segments);
  list_items(segments, static_cast<std::size_t>(pool.threads_for(work)));
  pool.parallel_for(items_.size(), work, [&](std::size_t item, int worker) {
    compute_item(items_[item], kernels, stream.kernel_scratch(worker));
  });
}

LoopWork ExpertBatch::work_of(std::span<const Segment> segments) const {
  LoopWork work;
  for (const Segment& segment : segments) {
    const std::size_t elements = 3 * segment.num_records * pitch_;
    work.bytes += elements * size_of(shape_.dtype_of(segment.expert));
    work.multiply_adds +=
        elements * (expert_begin_[segment.expert + 1] - expert_begin_[segment.expert]);
  }
  return work;
}

void ExpertBatch::compute_item(const Item& item, const CpuKernels& kernels, std::byte* scratch) {
  const DType dtype = shape_.dtype_of(item.segment->expert);
  const std::size_t record_bytes = 3 * pitch_ * size_of(dtype);
  const float* xs[kMaxTokens];
  float* ys[kMaxTokens];
  // A run that starts at the expert's first record adds its quanta up as it goes, which is the
  // order they are added in anyway; later runs cannot, for what comes before them may not be there
  // yet.
  const bool folds = !sums_per_quantum_ || item.first_record == 0;
  for (std::size_t done = 0; done < item.num_records; done += kQuantumRecords) {
    const std::size_t record = item.first_record + done;
    for (std::size_t i = 0; i < item.num_pairs; ++i) {
      const std::size_t pair = pairs_of_expert_[item.first_pair + i];
      xs[i] = x_.row(pair / routing_.slots);
      ys[i] = sum(pair, folds ? 0 : record / kQuantumRecords);
    }
    const std::byte* records =
        item.segment->records.data() + (record - item.segment->first_record) * record_bytes;
    const std::size_t count = std::min(kQuantumRecords, item.num_records - done);
    const bool accumulate = folds && record != 0;
    const bool more_follows = done + count < item.num_records;
    kernels.segment_quantum(dtype, records, count, pitch_, xs, ys, item.num_pairs, accumulate,
                            more_follows, scratch);
  }
}

void ExpertBatch::finish(ThreadPool& pool, const CpuKernels& kernels, float scale, Activations y) {
  constexpr std::size_t kColumns = 256;
  const std::size_t blocks = (pitch_ + kColumns - 1) / kColumns;
  const LoopWork work{.bytes = routing_.tokens * sum_offset_.back() * pitch_ * sizeof(float)};
  pool.parallel_for(routing_.tokens * blocks, work, [&](std::size_t item, int) {
    const std::size_t token = item / blocks;
    const std::size_t column = item % blocks * kColumns;
    const std::size_t width = std::min(kColumns, pitch_ - column);
    alignas(64) float total[kColumns];
    alignas(64) float expert[kColumns];
    for (std::size_t slot = 0; slot < routing_.slots; ++slot) {
      const std::size_t pair = token * routing_.slots + slot;
      const std::size_t sums = sum_offset_[slot + 1] - sum_offset_[slot];
      const auto expert_id = static_cast<std::size_t>(routing_.expert_ids[pair]);
      const float* whole = sum(pair, 0) + column;
      if (sums > 1) {
        kernels.scale(1.0f, whole, expert, width, /*accumulate=*/false);
        for (std::size_t q = num_folded_[expert_id]; q < sums; ++q) {
          if (q + 1 < sums) prefetch(sum(pair, q + 1) + column, width);
          kernels.scale(1.0f, sum(pair, q) + column, expert, width, /*accumulate=*/true);
        }
        whole = expert;
      }
      kernels.scale(routing_.expert_weights[pair], whole, total, width, /*accumulate=*/slot != 0);
    }
    kernels.scale(scale, total, y.row(token) + column, width, /*accumulate=*/true);
  });
}

}  // namespace moerun
