#include "expert/reader_engine.h"

#include <algorithm>
#include <system_error>

#include "base/error.h"

namespace moerun {
namespace {

constexpr int kAttempts = 2;  // a disk may stumble once
constexpr std::size_t kMostFailuresKept = 64;

int checked(int num_threads) {
  if (num_threads >= 1) return num_threads;
  throw InvalidArgument(message("reader_threads: expected at least 1, found ", num_threads));
}

}  // namespace

ReaderEngine::Crew::Crew(ReaderEngine& engine, const TransferStats& before) : stats(before) {
  try {
    for (int i = 0; i < engine.num_threads_; ++i) {
      threads.emplace_back([this, &engine] { work(engine); });
    }
  } catch (const std::system_error& error) {
    stop();
    throw OutOfMemory(message("the system refused a reading thread: ", error.what()));
  }
}

ReaderEngine::Crew::~Crew() { stop(); }

void ReaderEngine::Crew::stop() {
  {
    const std::lock_guard lock(mutex);
    is_stopping = true;
    demand.clear();
    prefetch.clear();
  }
  work_arrived.notify_all();
  for (auto& thread : threads) thread.join();
}

ReaderEngine::ReaderEngine(const ExpertStore& store, Progress& progress, int num_threads)
    : store_(store),
      progress_(progress),
      num_threads_(checked(num_threads)),
      crew_(std::make_unique<Crew>(*this, TransferStats{})) {}

ReaderEngine::~ReaderEngine() = default;

// Where a fork leaves the engine usable, nothing was queued or under way.
ReaderEngine::Crew& ReaderEngine::crew() const {
  return crew_.get([this](const Crew& parents) {
    return std::make_unique<Crew>(const_cast<ReaderEngine&>(*this), parents.stats);
  });
}

std::shared_ptr<Transfer> ReaderEngine::submit(SegmentRead read, StagingBlocks blocks,
                                               Urgency urgency) {
  Crew& own = crew();
  auto transfer = std::make_shared<Transfer>(std::move(read), std::move(blocks), urgency);
  transfer->num_pieces_ = store_.num_pieces(transfer->read());
  {
    const std::lock_guard lock(own.mutex);
    (urgency == Urgency::demand ? own.demand : own.prefetch).push_back(transfer);
    own.note_use();
  }
  own.work_arrived.notify_all();
  return transfer;
}

bool ReaderEngine::is_complete(const Transfer& transfer) {
  const std::lock_guard lock(crew().mutex);
  if (transfer.failure_) std::rethrow_exception(transfer.failure_);
  return transfer.num_done_ == transfer.num_pieces_;
}

std::uint64_t ReaderEngine::bytes_read(const Transfer& transfer) const {
  const std::lock_guard lock(crew().mutex);
  return transfer.bytes_;
}

void ReaderEngine::Crew::remove(const Transfer& transfer) {
  for (auto* queue : {&demand, &prefetch}) {
    std::erase_if(*queue, [&](const auto& queued) { return queued.get() == &transfer; });
  }
  note_use();
}

void ReaderEngine::Crew::note_use() {
  if (demand.empty() && prefetch.empty() && num_working == 0) {
    in_use.reset();
  } else if (!in_use) {
    in_use.emplace(InUse::Kind::background);
  }
}

void ReaderEngine::promote(const std::shared_ptr<Transfer>& transfer) {
  Crew& own = crew();
  const std::lock_guard lock(own.mutex);
  if (transfer->urgency_ == Urgency::demand) return;
  transfer->urgency_ = Urgency::demand;
  const auto queued = std::find(own.prefetch.begin(), own.prefetch.end(), transfer);
  if (queued == own.prefetch.end()) return;
  own.prefetch.erase(queued);
  own.demand.push_back(transfer);
}

void ReaderEngine::cancel(const std::shared_ptr<Transfer>& transfer) {
  Crew& own = crew();
  const std::lock_guard lock(own.mutex);
  transfer->is_cancelled_ = true;
  own.remove(*transfer);
}

void ReaderEngine::drain(const std::shared_ptr<Transfer>& transfer) {
  if (origin_.is_lost()) return;  // the threads that read for it exist only in the parent
  cancel(transfer);
  for (;;) {
    const std::uint64_t seen = progress_.now();
    {
      const std::lock_guard lock(crew().mutex);
      if (transfer->num_in_flight_ == 0) return;
    }
    progress_.wait_beyond(seen);
  }
}

TransferStats ReaderEngine::stats() const {
  Crew& own = crew();
  const std::lock_guard lock(own.mutex);
  TransferStats stats = own.stats;
  if (own.num_reading > 0) {
    stats.busy_seconds += std::chrono::duration<double>(Clock::now() - own.busy_since).count();
  }
  return stats;
}

std::shared_ptr<Transfer> ReaderEngine::Crew::next_transfer() {
  for (auto* queue : {&demand, &prefetch}) {
    if (queue->empty()) continue;
    auto transfer = queue->front();
    if (transfer->next_piece_ + 1 >= transfer->num_pieces_) queue->pop_front();
    return transfer;
  }
  return nullptr;
}

void ReaderEngine::Crew::work(ReaderEngine& engine) {
  ReadScratch scratch;
  std::unique_lock lock(mutex);
  for (;;) {
    std::shared_ptr<Transfer> transfer;
    work_arrived.wait(lock, [&] {
      if (is_stopping) return true;
      transfer = next_transfer();
      return transfer != nullptr;
    });
    if (is_stopping) return;
    ++num_working;
    const std::size_t piece = transfer->next_piece_++;
    ++transfer->num_in_flight_;
    if (num_reading++ == 0) busy_since = Clock::now();
    lock.unlock();

    std::uint64_t bytes = 0;
    std::exception_ptr failure;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      try {
        bytes = engine.store_.read_piece(transfer->read(), piece, scratch);
        failure = nullptr;
        break;
      } catch (...) {
        failure = std::current_exception();
      }
    }

    lock.lock();
    if (--num_reading == 0) {
      stats.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since).count();
    }
    stats.bytes += bytes;
    transfer->bytes_ += bytes;
    --transfer->num_in_flight_;
    ++transfer->num_done_;
    if (failure && !transfer->failure_) {
      transfer->failure_ = failure;
      if (failures.size() < kMostFailuresKept) failures.push_back(failure);
      remove(*transfer);
    }
    const bool is_over = transfer->num_done_ == transfer->num_pieces_ || transfer->failure_ ||
                         transfer->is_cancelled_;
    lock.unlock();
    transfer.reset();  // may give blocks back, which announces progress by itself
    if (is_over) engine.progress_.announce();
    lock.lock();
    --num_working;
    note_use();
  }
}

}  // namespace moerun
