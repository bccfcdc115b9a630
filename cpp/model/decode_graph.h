// Decoding a token where every expert is on the device: recorded once, then run again and again at
// the cost of one launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "model/decoder.h"

namespace moerun {

// For one sequence: its KV cache and memory are part of the recording.
class DecodeGraph {
 public:
  // `decoder` needs no host. Both must outlive this object.
  DecodeGraph(Decoder& decoder, Backend& backend, std::size_t vocab_size);

  // As Decoder::run() and compute_logits() of one token; `logits`: (vocab_size) or none.
  void run(const Decoder::Pass& pass, std::span<float> logits);

 private:
  bool serves(const Decoder::Pass& pass) const;
  void record(const Decoder::Pass& pass);

  Decoder& decoder_;
  Backend& backend_;
  std::unique_ptr<DeviceBuffer> host_input_;  // token id and position
  std::unique_ptr<DeviceBuffer> input_;       // the same on the device
  std::unique_ptr<DeviceBuffer> logits_;      // (vocab_size), the host's
  std::size_t vocab_size_;
  std::unique_ptr<RecordedWork> work_;
  std::size_t end_position_ = 0;  // positions below it are served by `work_`
  bool is_long_ = false;
  bool has_run_ = false;
};

}  // namespace moerun
