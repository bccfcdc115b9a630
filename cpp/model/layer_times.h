// What the last passes took, layer by layer: what a calibration asks for.
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <vector>

namespace moerun {

// Seconds of one pass; L layers with experts.
struct PassTimes {
  std::vector<double> attention_s;  // (L) from the last expert block to this layer's routing
  std::vector<double> moe_s;        // (L) from there to the end of the block, less waited_s
  std::vector<double> waited_s;     // (L) in it, for segments to arrive
  // From its begin to that of the next token of the sequence, so with the head, sampling and what
  // the caller does with the token; not a number where no token followed at once.
  double token_s = 0;
  std::size_t num_tokens = 0;
};

// Keeps the last tokens that were decoded and the last passes of prompts. One thread writes, any
// may ask. Moments are seconds of one clock.
class LayerTimes {
 public:
  static constexpr std::size_t kMaxTokens = 256;
  static constexpr std::size_t kMaxPrompts = 16;

  explicit LayerTimes(std::size_t num_layers) : num_layers_(num_layers) {}

  // A pass begins; one that was not ended is forgotten. `sequence` is one and the same for all
  // passes of a sequence.
  void begin(const void* sequence, std::size_t first_position, std::size_t num_tokens,
             bool is_decoding, double now);
  // The routing of the next layer with experts is known.
  void note_routing(double now);
  // Its experts are computed; waiting for them took `waited_s` of that time.
  void note_experts(double now, double waited_s);
  void end();

  std::size_t num_layers() const { return num_layers_; }
  std::vector<PassTimes> tokens() const;   // decoded, the oldest first
  std::vector<PassTimes> prompts() const;  // a pass each, the oldest first

 private:
  std::size_t num_layers_;
  PassTimes pass_;
  bool is_decoding_ = false;
  double began_ = 0;
  double last_ = 0;
  const void* sequence_ = nullptr;  // of the pass begun last
  std::size_t next_position_ = 0;
  bool may_continue_ = false;  // the last entry of tokens_ is the token before this one
  mutable std::mutex mutex_;
  std::deque<PassTimes> tokens_;
  std::deque<PassTimes> prompts_;
};

}  // namespace moerun
