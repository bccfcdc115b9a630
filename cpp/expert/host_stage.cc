#include "expert/host_stage.h"

#include <algorithm>
#include <exception>
#include <utility>

namespace moerun {
namespace {

std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

}  // namespace

HostStage::HostStage(const ModelWeights& weights, const ExpertStore& store, Bytes ring,
                     std::size_t block_bytes, Progress& progress, int num_threads)
    : weights_(weights),
      store_(store),
      block_bytes_(block_bytes),
      num_blocks_(ring.size() / block_bytes),
      ring_(ring, block_bytes, progress),
      reader_(store, progress, num_threads) {}

std::size_t HostStage::block_records(const SegmentRead& read) const {
  return block_bytes_ / weights_.layers[read.id.layer].record_bytes();
}

std::size_t HostStage::part_blocks(const SegmentRead& read) const {
  if (store_.is_divisible(read.id)) return 1;
  return std::min(divide_up(read.num_records, block_records(read)), num_blocks_ / 2);
}

void HostStage::submit(const std::shared_ptr<Transfer>& whole) {
  const SegmentRead& read = whole->read();
  whole->num_pieces_ = divide_up(read.num_records, part_blocks(read) * block_records(read));
  (whole->urgency_ == Urgency::demand ? demand_ : prefetch_).push_back(whole);
}

void HostStage::promote(const std::shared_ptr<Transfer>& whole) {
  const auto waiting = std::find(prefetch_.begin(), prefetch_.end(), whole);
  if (waiting != prefetch_.end()) {
    prefetch_.erase(waiting);
    demand_.push_back(whole);
  }
  for (const Part& part : reading_) {
    if (part.whole == whole) reader_.promote(part.read);
  }
}

void HostStage::cancel(const std::shared_ptr<Transfer>& whole) {
  for (auto* queue : {&demand_, &prefetch_}) std::erase(*queue, whole);
  std::erase_if(reading_, [&](const Part& part) {
    if (part.whole != whole) return false;
    reader_.cancel(part.read);
    whole->bytes_ += reader_.bytes_read(*part.read);
    return true;
  });
}

bool HostStage::start_part(const std::shared_ptr<Transfer>& whole, std::size_t num_left_free) {
  const SegmentRead& all = whole->read();
  const std::size_t per_block = block_records(all);
  const std::size_t done = whole->next_piece_ * part_blocks(all) * per_block;
  SegmentRead part{all.id, all.first_record + done, 0, {}};
  part.num_records = std::min(part_blocks(all) * per_block, all.num_records - done);
  const std::size_t num_blocks = divide_up(part.num_records, per_block);
  if (ring_.num_free() < num_blocks + num_left_free) return false;
  auto blocks = ring_.try_take(num_blocks);
  if (!blocks) return false;
  std::size_t record = part.first_record;
  const std::size_t end = part.first_record + part.num_records;
  for (const std::size_t index : blocks->indices()) {
    const std::size_t count = std::min(per_block, end - record);
    part.runs.push_back({record, count, ring_.block(index)});
    record += count;
  }
  auto read = reader_.submit(std::move(part), std::move(*blocks), whole->urgency_);
  reading_.push_back({whole, std::move(read)});
  ++whole->next_piece_;
  return true;
}

void HostStage::start_parts() {
  while (!demand_.empty()) {
    const auto whole = demand_.front();
    if (!start_part(whole, 0)) return;  // in order: no later one takes the room
    if (whole->next_piece_ == whole->num_pieces_) demand_.pop_front();
  }
  while (!prefetch_.empty()) {
    const auto whole = prefetch_.front();
    if (!start_part(whole, num_blocks_ / 2)) return;
    if (whole->next_piece_ == whole->num_pieces_) prefetch_.pop_front();
  }
}

std::vector<HostStage::Part> HostStage::take_landed() {
  std::vector<Part> landed;
  std::vector<std::shared_ptr<Transfer>> failed;
  std::erase_if(reading_, [&](Part& part) {
    try {
      if (!reader_.is_complete(*part.read)) return false;
    } catch (...) {
      part.whole->failure_ = std::current_exception();
      failed.push_back(part.whole);
      return false;
    }
    part.whole->bytes_ += reader_.bytes_read(*part.read);
    landed.push_back(std::move(part));
    return true;
  });
  for (const auto& whole : failed) cancel(whole);
  start_parts();
  return landed;
}

}  // namespace moerun
