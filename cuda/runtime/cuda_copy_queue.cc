#include "runtime/cuda_copy_queue.h"

#include <algorithm>

#include "runtime/cuda_stream.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

CudaCopyQueue::CudaCopyQueue() : urgent_(Priority::high), patient_(Priority::low) {}

void CudaCopyQueue::follow(Stream& compute) {
  computed_.record(static_cast<CudaStream&>(compute).handle());
  computed_.make_wait(patient_.handle());
  computed_.make_wait(urgent_.handle());
  // A copy that nobody wants any more may still be writing where one of the other lane will.
  patient_so_far_.record(patient_.handle());
  urgent_so_far_.record(urgent_.handle());
  patient_so_far_.make_wait(urgent_.handle());
  urgent_so_far_.make_wait(patient_.handle());
}

void CudaCopyQueue::copy(Lane lane, std::byte* destination, const std::byte* source,
                         std::size_t bytes) {
  copy_async((lane == Lane::urgent ? urgent_ : patient_).handle(), destination, source, bytes);
}

CopyQueue::Mark CudaCopyQueue::mark(Lane lane) {
  while (!marks_.empty() && marks_.front().event->is_done()) {
    spare_events_.push_back(std::move(marks_.front().event));
    marks_.pop_front();
  }
  marks_.push_back({++last_mark_, new_event()});
  marks_.back().event->record((lane == Lane::urgent ? urgent_ : patient_).handle());
  return last_mark_;
}

std::unique_ptr<DeviceEvent> CudaCopyQueue::new_event() {
  if (spare_events_.empty()) return std::make_unique<DeviceEvent>();
  auto event = std::move(spare_events_.back());
  spare_events_.pop_back();
  return event;
}

const CudaCopyQueue::Marked* CudaCopyQueue::find(Mark mark) {
  const auto found = std::lower_bound(marks_.begin(), marks_.end(), mark,
                                      [](const Marked& each, Mark m) { return each.mark < m; });
  return found != marks_.end() && found->mark == mark ? &*found : nullptr;
}

bool CudaCopyQueue::is_done(Mark mark) {
  const Marked* found = find(mark);
  return found == nullptr || found->event->is_done();
}

void CudaCopyQueue::make_wait(Stream& compute, Mark mark) {
  const Marked* found = find(mark);
  if (found != nullptr) found->event->make_wait(static_cast<CudaStream&>(compute).handle());
}

void CudaCopyQueue::synchronize() {
  patient_.synchronize();
  urgent_.synchronize();
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
