#include "model/layer_times.h"

#include <limits>
#include <utility>

namespace moerun {

void LayerTimes::begin(const void* sequence, std::size_t first_position, std::size_t num_tokens,
                       bool is_decoding, double now) {
  if (std::exchange(may_continue_, false) && is_decoding && sequence == sequence_ &&
      first_position == next_position_) {
    const std::lock_guard lock(mutex_);
    tokens_.back().token_s = now - began_;
  }
  sequence_ = sequence;
  next_position_ = first_position + num_tokens;
  is_decoding_ = is_decoding;
  pass_ = {};
  pass_.attention_s.reserve(num_layers_);
  pass_.moe_s.reserve(num_layers_);
  pass_.waited_s.reserve(num_layers_);
  pass_.token_s = std::numeric_limits<double>::quiet_NaN();
  pass_.num_tokens = num_tokens;
  began_ = last_ = now;
}

void LayerTimes::note_routing(double now) {
  pass_.attention_s.push_back(now - last_);
  last_ = now;
}

void LayerTimes::note_experts(double now, double waited_s) {
  pass_.moe_s.push_back(now - last_ - waited_s);
  pass_.waited_s.push_back(waited_s);
  last_ = now;
}

void LayerTimes::end() {
  if (pass_.moe_s.size() != num_layers_) return;
  const std::lock_guard lock(mutex_);
  auto& passes = is_decoding_ ? tokens_ : prompts_;
  if (passes.size() == (is_decoding_ ? kMaxTokens : kMaxPrompts)) passes.pop_front();
  passes.push_back(std::move(pass_));
  may_continue_ = is_decoding_;
}

std::vector<PassTimes> LayerTimes::tokens() const {
  const std::lock_guard lock(mutex_);
  return {tokens_.begin(), tokens_.end()};
}

std::vector<PassTimes> LayerTimes::prompts() const {
  const std::lock_guard lock(mutex_);
  return {prompts_.begin(), prompts_.end()};
}

}  // namespace moerun
