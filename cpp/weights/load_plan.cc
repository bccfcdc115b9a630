#include "weights/load_plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "base/error.h"
#include "weights/placement.h"

namespace moerun {
namespace {

// Pieces small enough that what is staged for transposition or conversion stays in the second-level
// cache of most processors.
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

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

void LoadPlan::read(const Task& task, Staging& staging) {
  const FileMatrix& source = task.source;
  const RowTarget& target = task.target;
  if (source.dtype == target.dtype && !task.transposed) {
    source.file->read_rows_at(source.offset, source.row_bytes(), source.rows, target.data,
                              target.stride);
    return;
  }
  const std::size_t bytes = source.rows * source.row_bytes();
  if (staging.file.size() < bytes) staging.file = HostMemory(bytes, "reading weights");
  source.file->read_at(source.offset, {staging.file.data(), bytes});
  const TypedRows rows = converted(source, staging.file.data(), target.dtype, staging.converted);
  if (task.transposed) {
    place_transposed(rows, 0, rows.cols, {target.data, target.stride});
  } else {
    place_rows(rows, 0, rows.rows, {target.data, target.stride});
  }
}

void LoadPlan::run(ThreadPool& pool, const LoadProgress& progress) const {
  using Clock = std::chrono::steady_clock;
  constexpr auto kInterval = std::chrono::milliseconds(50);
  std::atomic<std::uint64_t> bytes_done{0};
  std::vector<Staging> staging(static_cast<std::size_t>(pool.num_threads()));
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
