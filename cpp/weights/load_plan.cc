#include "weights/load_plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "base/error.h"
#include "weights/transpose.h"

namespace moerun {
namespace {

// Pieces small enough that what is staged for transposition or conversion stays in the second-level
// cache of most processors.
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

void convert_to_float(DType dtype, const std::byte* source, float* target, std::size_t n) {
  if (dtype == DType::f32) {
    std::memcpy(target, source, n * sizeof(float));
    return;
  }
  const auto* bits = reinterpret_cast<const std::uint16_t*>(source);
  for (std::size_t i = 0; i < n; ++i) {
    target[i] = dtype == DType::bf16 ? bf16_to_float(bits[i]) : f16_to_float(bits[i]);
  }
}

}  // namespace

void LoadPlan::add_rows(const FileMatrix& source, const RowTarget& target) {
  add(source, target, /*transposed=*/false);
}

void LoadPlan::add_transposed(const FileMatrix& source, const RowTarget& target) {
  add(source, target, /*transposed=*/true);
}

void LoadPlan::add(const FileMatrix& source, const RowTarget& target, bool transposed) {
  std::size_t rows_per_piece = std::max<std::size_t>(1, kPieceBytes / source.row_bytes());
  // Whole cache lines of the transposed rows, so that no two threads write to one.
  if (transposed) rows_per_piece = (rows_per_piece + kRowQuantum - 1) / kRowQuantum * kRowQuantum;
  for (std::size_t row = 0; row < source.rows; row += rows_per_piece) {
    Task task{source, target, transposed};
    task.source.offset += row * source.row_bytes();
    task.source.rows = std::min(rows_per_piece, source.rows - row);
    task.target.data += transposed ? row * size_of(target.dtype) : row * target.stride;
    tasks_.push_back(task);
  }
  total_bytes_ += source.rows * source.row_bytes();
}

void LoadPlan::read(const Task& task, HostMemory& staging) {
  const FileMatrix& source = task.source;
  const bool converts = source.dtype != task.target.dtype;
  if (!converts && !task.transposed) {
    source.file->read_rows_at(source.offset, source.row_bytes(), source.rows, task.target.data,
                              task.target.stride);
    return;
  }
  const std::size_t bytes = source.rows * source.row_bytes();
  const std::size_t count = source.rows * source.cols;
  const std::size_t needed = bytes + (converts ? 4 + count * sizeof(float) : 0);
  if (staging.size() < needed) staging = HostMemory(needed, "reading weights");
  source.file->read_at(source.offset, {staging.data(), bytes});
  const std::byte* data = staging.data();
  std::size_t row_bytes = source.row_bytes();
  if (converts) {
    auto* floats = reinterpret_cast<float*>(staging.data() + (bytes + 3) / 4 * 4);
    convert_to_float(source.dtype, data, floats, count);
    data = reinterpret_cast<const std::byte*>(floats);
    row_bytes = source.cols * sizeof(float);
  }
  if (task.transposed) {
    transpose(data, row_bytes, source.rows, source.cols, task.target.data, task.target.stride,
              size_of(task.target.dtype));
  } else {
    for (std::size_t row = 0; row < source.rows; ++row) {
      std::memcpy(task.target.data + row * task.target.stride, data + row * row_bytes, row_bytes);
    }
  }
}

void LoadPlan::run(ThreadPool& pool, const LoadProgress& progress) const {
  using Clock = std::chrono::steady_clock;
  constexpr auto kInterval = std::chrono::milliseconds(50);
  std::atomic<std::uint64_t> bytes_done{0};
  std::vector<HostMemory> staging(static_cast<std::size_t>(pool.num_threads()));
  auto last_report = Clock::now();
  if (progress) progress(0, total_bytes_);
  pool.parallel_for(tasks_.size(), [&](std::size_t item, int worker) {
    const Task& task = tasks_[item];
    read(task, staging[static_cast<std::size_t>(worker)]);
    bytes_done.fetch_add(task.source.rows * task.source.row_bytes(), std::memory_order_relaxed);
    // Worker 0 is the caller's own thread: only it may call back.
    if (worker == 0 && progress && Clock::now() - last_report >= kInterval) {
      last_report = Clock::now();
      progress(bytes_done.load(std::memory_order_relaxed), total_bytes_);
    }
  });
  if (progress) progress(total_bytes_, total_bytes_);
}

}  // namespace moerun
