#include "device/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace moerun {
namespace {

// Rows of a projection that one thread takes at a time: many, for every start waits for memory, but
// enough items to share out evenly. With many tokens there is more work in a row.
constexpr std::size_t kMaxRowsPerItem = 512;
constexpr std::size_t kMaxRowsManyTokens = 128;
constexpr std::size_t kMaxProducts = kMaxTokens * kMaxRowsManyTokens;  // of an item
constexpr std::size_t kItemsPerThread = 4;

std::size_t rows_per_item(std::size_t rows, std::size_t tokens, int num_threads) {
  const std::size_t fitting = kMaxProducts / std::clamp<std::size_t>(tokens, 1, kMaxTokens);
  const std::size_t most = std::min(fitting / 32 * 32, kMaxRowsPerItem);
  const std::size_t share = rows / (kItemsPerThread * static_cast<std::size_t>(num_threads));
  return std::clamp<std::size_t>(share / 32 * 32, 32, most);
}

class CpuBuffer final : public DeviceBuffer {
 public:
  explicit CpuBuffer(HostMemory memory)
      : DeviceBuffer(memory.data(), memory.size()), memory_(std::move(memory)) {}

 private:
  HostMemory memory_;
};

CpuStream& cpu(Stream& stream) { return static_cast<CpuStream&>(stream); }

float weight_at(const MatrixView& matrix, const std::byte* row, std::size_t i) {
  switch (matrix.dtype) {
    case DType::f32:
      return reinterpret_cast<const float*>(row)[i];
    case DType::f16:
      return f16_to_float(reinterpret_cast<const std::uint16_t*>(row)[i]);
    case DType::bf16:
      return bf16_to_float(reinterpret_cast<const std::uint16_t*>(row)[i]);
  }
  return 0;
}

}  // namespace

CpuStream::CpuStream(int num_threads) : worker_floats_(static_cast<std::size_t>(num_threads)) {
  for (int worker = 0; worker < num_threads; ++worker) {
    kernel_scratch_.emplace_back(kKernelScratchBytes, "kernel scratch");
  }
}

std::size_t CpuStream::scratch_bytes() const {
  std::size_t total = experts_.scratch_bytes();
  for (const auto& memory : kernel_scratch_) total += memory.size();
  for (const auto& memory : worker_floats_) total += memory.size();
  return total;
}

float* CpuStream::worker_floats(int worker, std::size_t count) {
  auto& memory = worker_floats_[static_cast<std::size_t>(worker)];
  if (memory.size() < count * sizeof(float)) {
    memory = HostMemory(count * sizeof(float), "attention scratch");
  }
  return memory.as<float>();
}

std::unique_ptr<Stream> CpuBackend::make_stream() {
  return std::make_unique<CpuStream>(pool_.num_threads());
}

std::unique_ptr<DeviceBuffer> CpuBackend::allocate(std::size_t bytes, std::string_view what,
                                                   MemoryUse use) {
  const PageSize pages = use == MemoryUse::streamed ? PageSize::huge : PageSize::small;
  return std::make_unique<CpuBuffer>(HostMemory(bytes, what, pages));
}

void CpuBackend::copy(Stream&, std::byte* destination, const std::byte* source, std::size_t bytes) {
  std::memmove(destination, source, bytes);
}

void CpuBackend::embed(Stream&, const MatrixView& table, std::span<const std::int32_t> token_ids,
                       float scale, Activations out) {
  for (std::size_t t = 0; t < token_ids.size(); ++t) {
    const std::byte* row = table.row(static_cast<std::size_t>(token_ids[t]));
    float* target = out.row(t);
    for (std::size_t i = 0; i < table.cols; ++i) target[i] = scale * weight_at(table, row, i);
    // An earlier pass that met NaN left it in the padding, too.
    std::fill(target + table.cols, target + out.pitch, 0.0f);
  }
}

void CpuBackend::norm(Stream&, const NormWeights& weights, Activations x, Activations out) {
  const LoopWork work{.bytes = 2 * x.rows * x.cols * sizeof(float)};
  pool_.parallel_for(x.rows, work, [&](std::size_t t, int) {
    if (weights.kind == NormKind::rms) {
      kernels_.rms_norm(x.row(t), weights.weight, weights.eps, out.row(t), x.cols);
    } else {
      kernels_.layer_norm(x.row(t), weights.weight, weights.bias, weights.eps, out.row(t), x.cols);
    }
  });
}

void CpuBackend::linear(Stream& stream, const LinearWeights& weights, Activations x, Activations y,
                        LinearOutput output) {
  const MatrixView& matrix = weights.weight;
  const LoopWork work{matrix.bytes(), x.rows * matrix.rows * matrix.pitch};
  const std::size_t item_rows = rows_per_item(matrix.rows, x.rows, pool_.threads_for(work));
  const std::size_t row_blocks = (matrix.rows + item_rows - 1) / item_rows;
  const std::size_t token_blocks = (x.rows + kMaxTokens - 1) / kMaxTokens;
  // Token blocks of one row block follow each other, so that its weights are still in cache.
  pool_.parallel_for(row_blocks * token_blocks, work, [&](std::size_t item, int worker) {
    const std::size_t row = item / token_blocks * item_rows;
    const std::size_t rows = std::min(item_rows, matrix.rows - row);
    const std::size_t token = item % token_blocks * kMaxTokens;
    const std::size_t tokens = std::min(kMaxTokens, x.rows - token);
    alignas(64) float products[kMaxProducts];
    const float* xs[kMaxTokens];
    float* outs[kMaxTokens];
    for (std::size_t t = 0; t < tokens; ++t) {
      xs[t] = x.row(token + t);
      outs[t] = products + t * item_rows;
    }
    kernels_.dot(matrix.dtype, matrix.row(row), matrix.row_bytes(), rows, matrix.pitch, xs, outs,
                 tokens, cpu(stream).kernel_scratch(worker));
    for (std::size_t t = 0; t < tokens; ++t) {
      float* target = y.row(token + t) + row;
      for (std::size_t r = 0; r < rows; ++r) {
        const float biased =
            products[t * item_rows + r] + (weights.bias ? weights.bias[row + r] : 0.0f);
        target[r] = output.accumulate ? target[r] + output.scale * biased : output.scale * biased;
      }
    }
  });
}

void CpuBackend::begin_experts(Stream& stream, const ExpertShape& shape, Activations x,
                               const Routing& routing) {
  cpu(stream).experts().begin(shape, x, routing);
}

void CpuBackend::compute_segments(Stream& stream, std::span<const Segment> segments) {
  cpu(stream).experts().compute(pool_, kernels_, cpu(stream), segments);
}

void CpuBackend::finish_experts(Stream& stream, float scale, Activations y) {
  cpu(stream).experts().finish(pool_, kernels_, scale, y);
}

std::unique_ptr<Backend> make_cpu_backend(int threads, std::string_view kernels) {
  return std::make_unique<CpuBackend>(threads, choose_cpu_kernels(kernels));
}

}  // namespace moerun
