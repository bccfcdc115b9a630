#include "expert/copy_engine.h"

#include <algorithm>
#include <utility>

namespace moerun {
namespace {

// Large enough to reach the speed of the link, small enough that demand waits little behind one:
// 40 us at 50 GB/s.
constexpr std::size_t kPieceBytes = std::size_t{2} << 20;
constexpr std::size_t kPatientPieces = 2;

}  // namespace

CopyEngine::CopyEngine(const ModelWeights& weights, CopyQueue& queue)
    : weights_(weights), queue_(queue) {}

CopyEngine::~CopyEngine() {
  try {
    queue_.synchronize();
  } catch (...) {  // the device has failed, and has said so to a call that can throw
  }
}

std::vector<CopyEngine::Piece> CopyEngine::pieces_of(const SegmentRead& read) const {
  const LayerWeights& layer = weights_.layers[read.id.layer];
  const ConstBytes records = layer.records_of(read.id.expert);
  std::vector<Piece> pieces;
  for (const RecordRun& run : read.runs) {
    const std::size_t total = run.num_records * layer.record_bytes();
    const std::byte* source = records.data() + run.first_record * layer.record_bytes();
    for (std::size_t done = 0; done < total; done += kPieceBytes) {
      pieces.push_back({run.data + done, source + done, std::min(kPieceBytes, total - done)});
    }
  }
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

void CopyEngine::issue(Transfer& transfer, const Piece& piece, CopyQueue::Lane lane) {
  queue_.copy(lane, piece.destination, piece.source, piece.bytes);
  transfer.bytes_ += piece.bytes;
  const std::lock_guard lock(stats_mutex_);
  stats_.bytes += piece.bytes;
  if (!std::exchange(is_busy_, true)) busy_since_ = Clock::now();
}

void CopyEngine::issue_all(Transfer& transfer, std::vector<Piece>& pieces) {
  queue_.follow(*compute_);
  for (; !pieces.empty(); pieces.pop_back()) {
    issue(transfer, pieces.back(), CopyQueue::Lane::urgent);
  }
  transfer.mark_ = last_urgent_ = queue_.mark(CopyQueue::Lane::urgent);
}

std::shared_ptr<Transfer> CopyEngine::submit(SegmentRead read, StagingBlocks blocks,
                                             Urgency urgency) {
  auto transfer = std::make_shared<Transfer>(std::move(read), std::move(blocks), urgency);
  auto pieces = pieces_of(transfer->read());
  if (urgency == Urgency::demand) {
    issue_all(*transfer, pieces);
  } else {
    prefetch_.push_back({transfer, std::move(pieces)});
  }
  pump();
  return transfer;
}

void CopyEngine::pump() {
  while (!patient_marks_.empty() && queue_.is_done(patient_marks_.front())) {
    patient_marks_.pop_front();
  }
  bool has_followed = false;
  while (!prefetch_.empty() && patient_marks_.size() < kPatientPieces) {
    // Its memory may have been read by what was issued since the transfer was submitted.
    if (!std::exchange(has_followed, true)) queue_.follow(*compute_);
    Pending& next = prefetch_.front();
    issue(*next.transfer, next.pieces.back(), CopyQueue::Lane::patient);
    next.pieces.pop_back();
    patient_marks_.push_back(queue_.mark(CopyQueue::Lane::patient));
    if (!next.pieces.empty()) continue;
    next.transfer->mark_ = patient_marks_.back();
    prefetch_.pop_front();
  }
  look_whether_idle();
}

void CopyEngine::look_whether_idle() {
  if (!patient_marks_.empty() || !queue_.is_done(last_urgent_)) return;
  const std::lock_guard lock(stats_mutex_);
  if (!std::exchange(is_busy_, false)) return;
  stats_.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
}

bool CopyEngine::is_complete(const Transfer& transfer) {
  pump();
  return transfer.mark_ != 0 && queue_.is_done(transfer.mark_);
}

bool CopyEngine::is_usable(const Transfer& transfer) {
  pump();
  return transfer.mark_ != 0;
}

void CopyEngine::promote(const std::shared_ptr<Transfer>& transfer) {
  transfer->urgency_ = Urgency::demand;
  const auto found = std::find_if(prefetch_.begin(), prefetch_.end(),
                                  [&](const auto& each) { return each.transfer == transfer; });
  if (found == prefetch_.end()) return;
  Pending pending = std::move(*found);
  prefetch_.erase(found);
  issue_all(*transfer, pending.pieces);
}

void CopyEngine::cancel(const std::shared_ptr<Transfer>& transfer) {
  transfer->is_cancelled_ = true;
  std::erase_if(prefetch_, [&](const auto& each) { return each.transfer == transfer; });
}

void CopyEngine::drain(const std::shared_ptr<Transfer>& transfer) {
  cancel(transfer);
  queue_.synchronize();
}

TransferStats CopyEngine::stats() const {
  const std::lock_guard lock(stats_mutex_);
  TransferStats stats = stats_;
  if (is_busy_) {
    stats.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
  }
  return stats;
}

}  // namespace moerun
