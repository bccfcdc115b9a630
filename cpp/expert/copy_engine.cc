#include "expert/copy_engine.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "base/error.h"

namespace moerun {
namespace {

// Large enough to reach the speed of the link, small enough that demand waits little behind one:
// 40 us at 50 GB/s.
constexpr std::size_t kPieceBytes = std::size_t{2} << 20;
constexpr std::size_t kPatientPieces = 2;

}  // namespace

CopyEngine::CopyEngine(const ModelWeights& weights, const HostExperts& experts, CopyQueue& queue,
                       std::unique_ptr<HostStage> stage)
    : weights_(weights), experts_(experts), queue_(queue), stage_(std::move(stage)) {}

CopyEngine::~CopyEngine() {
  try {
    queue_.synchronize();
  } catch (...) {  // the device has failed, and has said so to a call that can throw
  }
}

// What the runs `from` hold of the segment, in order.
std::vector<CopyEngine::Piece> CopyEngine::pieces_of(const SegmentRead& read,
                                                     const std::vector<RecordRun>& from) const {
  const std::size_t record_bytes = weights_.layers[read.id.layer].record_bytes();
  std::vector<Piece> pieces;
  for (const RecordRun& run : read.runs) {
    for (const RecordRun& source : from) {
      const std::size_t first = std::max(run.first_record, source.first_record);
      const std::size_t end =
          std::min(run.first_record + run.num_records, source.first_record + source.num_records);
      if (first >= end) continue;
      std::byte* to = run.data + (first - run.first_record) * record_bytes;
      const std::byte* data = source.data + (first - source.first_record) * record_bytes;
      const std::size_t total = (end - first) * record_bytes;
      for (std::size_t done = 0; done < total; done += kPieceBytes) {
        pieces.push_back({to + done, data + done, std::min(kPieceBytes, total - done)});
      }
    }
  }
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

void CopyEngine::issue(Pending& pending, CopyQueue::Lane lane) {
  const Piece piece = pending.pieces.back();
  queue_.copy(lane, piece.destination, piece.source, piece.bytes);
  pending.pieces.pop_back();
  note_busy();
  if (pending.staged) return;  // counted when it was read
  pending.transfer->bytes_ += piece.bytes;
  const std::lock_guard lock(stats_mutex_);
  stats_.bytes += piece.bytes;
}

void CopyEngine::finish(Pending& pending, CopyQueue::Mark mark) {
  if (pending.staged) copying_.push_back({mark, std::move(pending.staged)});
  Transfer& transfer = *pending.transfer;
  if (++transfer.num_done_ == transfer.num_pieces_) transfer.mark_ = mark;
}

void CopyEngine::issue_urgently(Pending& pending) {
  while (!pending.pieces.empty()) issue(pending, CopyQueue::Lane::urgent);
  last_urgent_ = queue_.mark(CopyQueue::Lane::urgent);
  finish(pending, last_urgent_);
}

std::shared_ptr<Transfer> CopyEngine::submit(SegmentRead read, StagingBlocks blocks,
                                             Urgency urgency) {
  auto transfer = std::make_shared<Transfer>(std::move(read), std::move(blocks), urgency);
  // What is issued for it later, too, overwrites only what has been read by now.
  if (urgency == Urgency::demand) queue_.follow(*compute_);
  const SegmentRead& segment = transfer->read();
  if (experts_.place_of(segment.id) == HostExperts::Place::page_locked) {
    const std::size_t records = weights_.layers[segment.id.layer].experts.intermediate_size;
    Pending pending{
        transfer, pieces_of(segment, {{0, records, experts_.records_of(segment.id).data()}}), {}};
    transfer->num_pieces_ = 1;
    if (urgency == Urgency::demand) {
      issue_urgently(pending);
    } else {
      prefetch_.push_back(std::move(pending));
    }
  } else {
    stage_->submit(transfer);
    note_busy();
  }
  pump();
  return transfer;
}

void CopyEngine::land(HostStage::Part part) {
  Pending pending{part.whole, pieces_of(part.whole->read(), part.read->read().runs), part.read};
  if (part.whole->urgency_ == Urgency::demand) {
    issue_urgently(pending);
  } else {
    prefetch_.push_back(std::move(pending));
  }
}

void CopyEngine::pump() {
  while (!patient_marks_.empty() && queue_.is_done(patient_marks_.front())) {
    patient_marks_.pop_front();
  }
  std::erase_if(copying_, [&](const Copying& each) { return queue_.is_done(each.mark); });
  if (stage_) {
    for (HostStage::Part& part : stage_->take_landed()) land(std::move(part));
  }
  bool has_followed = false;
  while (!prefetch_.empty() && patient_marks_.size() < kPatientPieces) {
    // Its memory may have been read by what was issued since the transfer was submitted.
    if (!std::exchange(has_followed, true)) queue_.follow(*compute_);
    Pending& next = prefetch_.front();
    issue(next, CopyQueue::Lane::patient);
    patient_marks_.push_back(queue_.mark(CopyQueue::Lane::patient));
    if (!next.pieces.empty()) continue;
    finish(next, patient_marks_.back());
    prefetch_.pop_front();
  }
  look_whether_idle();
}

void CopyEngine::note_busy() {
  const std::lock_guard lock(stats_mutex_);
  if (!std::exchange(is_busy_, true)) busy_since_ = Clock::now();
}

void CopyEngine::look_whether_idle() {
  if (!patient_marks_.empty() || !queue_.is_done(last_urgent_)) return;
  if (stage_ && !stage_->is_idle()) return;
  const std::lock_guard lock(stats_mutex_);
  if (!std::exchange(is_busy_, false)) return;
  stats_.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
}

bool CopyEngine::is_complete(const Transfer& transfer) {
  pump();
  if (transfer.failure_) std::rethrow_exception(transfer.failure_);
  return transfer.mark_ != 0 && queue_.is_done(transfer.mark_);
}

bool CopyEngine::is_usable(const Transfer& transfer) {
  pump();
  if (transfer.failure_) std::rethrow_exception(transfer.failure_);
  return transfer.mark_ != 0;
}

void CopyEngine::promote(const std::shared_ptr<Transfer>& transfer) {
  if (std::exchange(transfer->urgency_, Urgency::demand) == Urgency::demand) return;
  if (transfer->mark_ != 0) return;
  queue_.follow(*compute_);  // also behind what the patient lane has of it
  if (stage_) stage_->promote(transfer);
  for (Pending& pending : prefetch_) {
    if (pending.transfer == transfer) issue_urgently(pending);
  }
  std::erase_if(prefetch_, [&](const auto& each) { return each.transfer == transfer; });
}

void CopyEngine::cancel(const std::shared_ptr<Transfer>& transfer) {
  transfer->is_cancelled_ = true;
  std::erase_if(prefetch_, [&](const auto& each) {
    // What the stage keeps for a piece under way must live on.
    if (each.transfer == transfer && each.staged && !patient_marks_.empty()) {
      copying_.push_back({patient_marks_.back(), each.staged});
    }
    return each.transfer == transfer;
  });
  if (stage_) stage_->cancel(transfer);
}

void CopyEngine::drain(const std::shared_ptr<Transfer>& transfer) {
  cancel(transfer);
  try {
    queue_.synchronize();
  } catch (const DeviceError&) {  // it has said so to a call that can throw, and writes no more
  }
}

bool CopyEngine::has_silent_progress() const {
  return stage_ != nullptr && (!copying_.empty() || !patient_marks_.empty());
}

TransferStats CopyEngine::stats() const {
  const std::lock_guard lock(stats_mutex_);
  TransferStats stats = stats_;
  if (stage_) stats.bytes += stage_->stats().bytes;
  if (is_busy_) {
    stats.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
  }
  return stats;
}

}  // namespace moerun
