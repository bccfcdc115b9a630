// The copies of the expert cache: a stream of high priority for what is needed now, one of low
// priority for what may be needed next.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "device/copy_queue.h"
#include "runtime/runtime.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

class CudaCopyQueue final : public CopyQueue {
 public:
  CudaCopyQueue();

  void follow(Stream& compute) override;
  void copy(Lane lane, std::byte* destination, const std::byte* source, std::size_t bytes) override;
  Mark mark(Lane lane) override;
  bool is_done(Mark mark) override;
  void make_wait(Stream& compute, Mark mark) override;
  void synchronize() override;

 private:
  struct Marked {
    Mark mark = 0;
    std::unique_ptr<DeviceEvent> event;
  };
  const Marked* find(Mark mark);
  std::unique_ptr<DeviceEvent> new_event();

  DeviceStream urgent_;
  DeviceStream patient_;
  DeviceEvent computed_;  // what follow() saw
  DeviceEvent patient_so_far_;
  DeviceEvent urgent_so_far_;
  Mark last_mark_ = 0;
  std::deque<Marked> marks_;  // rising; those before the first are done
  std::vector<std::unique_ptr<DeviceEvent>> spare_events_;
};

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
