#include "expert/reader_engine.h"

#include <algorithm>
#include <system_error>

#include "base/error.h"

namespace moerun {
namespace {

constexpr int kAttempts = 2;  // a disk may stumble once

}  // namespace

ReaderEngine::ReaderEngine(const ExpertStore& store, Progress& progress, int num_threads)
    : store_(store), progress_(progress) {
  if (num_threads < 1) {
    throw InvalidArgument(message("reader_threads: expected at least 1, found ", num_threads));
  }
  const auto stop = [this] {
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
    }
    work_arrived_.notify_all();
    for (auto& thread : threads_) thread.join();
  };
  try {
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error& error) {
    stop();
    throw OutOfMemory(message("the system refused a reading thread: ", error.what()));
  }
}

ReaderEngine::~ReaderEngine() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
    demand_.clear();
    prefetch_.clear();
  }
  work_arrived_.notify_all();
  for (auto& thread : threads_) thread.join();
}

std::shared_ptr<Transfer> ReaderEngine::submit(SegmentRead read, StagingBlocks blocks,
                                               Urgency urgency) {
  auto transfer = std::make_shared<Transfer>(std::move(read), std::move(blocks), urgency);
  transfer->num_pieces_ = store_.num_pieces(transfer->read());
  {
    const std::lock_guard lock(mutex_);
    (urgency == Urgency::demand ? demand_ : prefetch_).push_back(transfer);
  }
  work_arrived_.notify_all();
  return transfer;
}

bool ReaderEngine::is_complete(const Transfer& transfer) {
  const std::lock_guard lock(mutex_);
  if (transfer.failure_) std::rethrow_exception(transfer.failure_);
  return transfer.num_done_ == transfer.num_pieces_;
}

std::uint64_t ReaderEngine::bytes_read(const Transfer& transfer) const {
  const std::lock_guard lock(mutex_);
  return transfer.bytes_;
}

void ReaderEngine::remove(const Transfer& transfer) {
  for (auto* queue : {&demand_, &prefetch_}) {
    std::erase_if(*queue, [&](const auto& queued) { return queued.get() == &transfer; });
  }
}

void ReaderEngine::promote(const std::shared_ptr<Transfer>& transfer) {
  const std::lock_guard lock(mutex_);
  if (transfer->urgency_ == Urgency::demand) return;
  transfer->urgency_ = Urgency::demand;
  const auto queued = std::find(prefetch_.begin(), prefetch_.end(), transfer);
  if (queued == prefetch_.end()) return;
  prefetch_.erase(queued);
  demand_.push_back(transfer);
}

void ReaderEngine::cancel(const std::shared_ptr<Transfer>& transfer) {
  const std::lock_guard lock(mutex_);
  transfer->is_cancelled_ = true;
  remove(*transfer);
}

void ReaderEngine::drain(const std::shared_ptr<Transfer>& transfer) {
  cancel(transfer);
  for (;;) {
    const std::uint64_t seen = progress_.now();
    {
      const std::lock_guard lock(mutex_);
      if (transfer->num_in_flight_ == 0) return;
    }
    progress_.wait_beyond(seen);
  }
}

TransferStats ReaderEngine::stats() const {
  const std::lock_guard lock(mutex_);
  TransferStats stats = stats_;
  if (num_reading_ > 0) {
    stats.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
  }
  return stats;
}

std::shared_ptr<Transfer> ReaderEngine::next_transfer() {
  for (auto* queue : {&demand_, &prefetch_}) {
    if (queue->empty()) continue;
    auto transfer = queue->front();
    if (transfer->next_piece_ + 1 >= transfer->num_pieces_) queue->pop_front();
    return transfer;
  }
  return nullptr;
}

void ReaderEngine::work() {
  ReadScratch scratch;
  std::unique_lock lock(mutex_);
  for (;;) {
    std::shared_ptr<Transfer> transfer;
    work_arrived_.wait(lock, [&] {
      if (is_stopping_) return true;
      transfer = next_transfer();
      return transfer != nullptr;
    });
    if (is_stopping_) return;
    const std::size_t piece = transfer->next_piece_++;
    ++transfer->num_in_flight_;
    if (num_reading_++ == 0) busy_since_ = Clock::now();
    lock.unlock();

    std::uint64_t bytes = 0;
    std::exception_ptr failure;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      try {
        bytes = store_.read_piece(transfer->read(), piece, scratch);
        failure = nullptr;
        break;
      } catch (...) {
        failure = std::current_exception();
      }
    }

    lock.lock();
    if (--num_reading_ == 0) {
      stats_.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
    }
    stats_.bytes += bytes;
    transfer->bytes_ += bytes;
    --transfer->num_in_flight_;
    ++transfer->num_done_;
    if (failure && !transfer->failure_) {
      transfer->failure_ = failure;
      remove(*transfer);
    }
    const bool is_over = transfer->num_done_ == transfer->num_pieces_ || transfer->failure_ ||
                         transfer->is_cancelled_;
    lock.unlock();
    transfer.reset();  // may give blocks back, which announces progress by itself
    if (is_over) progress_.announce();
    lock.lock();
  }
}

}  // namespace moerun
