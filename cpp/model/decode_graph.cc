#include "model/decode_graph.h"

#include <algorithm>
#include <bit>

#include "base/error.h"

namespace moerun {
namespace {

// Recordings are made for positions up to a power of two, no less than this.
constexpr std::size_t kFewestPositions = 64;

}  // namespace

DecodeGraph::DecodeGraph(Decoder& decoder, Backend& backend, std::size_t vocab_size)
    : decoder_(decoder),
      backend_(backend),
      host_input_(backend.allocate(2 * sizeof(std::int32_t), "a token", MemoryUse::shared)),
      input_(backend.allocate(2 * sizeof(std::int32_t), "a token", MemoryUse::streamed)),
      logits_(backend.allocate(vocab_size * sizeof(float), "logits", MemoryUse::shared)),
      vocab_size_(vocab_size) {}

bool DecodeGraph::serves(const Decoder::Pass& pass) const {
  const Decoder::Sequence& sequence = pass.only_sequence();
  return work_ && work_->is_current() && sequence.first_position < end_position_ &&
         decoder_.is_long(sequence.length) == is_long_;
}

void DecodeGraph::record(const Decoder::Pass& pass) {
  work_.reset();
  const Decoder::Sequence& now = pass.only_sequence();
  end_position_ = std::min(std::max(kFewestPositions, std::bit_ceil(now.first_position + 1)),
                           now.kv_cache->capacity_tokens());
  is_long_ = decoder_.is_long(now.length);
  const Decoder::InputOnDevice input{input_->as<std::int32_t>(), input_->as<std::int32_t>() + 1};
  const Decoder::Sequence last{now.kv_cache, end_position_ - 1, 1, now.length};
  const Decoder::Pass recorded{pass.stream,
                               pass.workspace,
                               pass.token_ids,
                               {&last, 1},
                               /*is_decoding=*/true,
                               /*between_layers=*/nullptr,
                               /*record=*/nullptr,
                               &input};
  work_ = backend_.record(pass.stream, [&] {
    backend_.copy(pass.stream, input_->data(), host_input_->data(), input_->size());
    decoder_.run(recorded);
    decoder_.issue_logits(recorded, 0, 1);
    backend_.copy(pass.stream, logits_->data(),
                  reinterpret_cast<const std::byte*>(pass.workspace.logits.data), logits_->size());
  });
}

void DecodeGraph::run(const Decoder::Pass& pass, std::span<float> logits) {
  if (pass.between_layers != nullptr) (*pass.between_layers)();
  if (work_ && !work_->is_current()) {
    work_.reset();
    has_run_ = false;
  }
  if (!has_run_) {  // memory for scratch is taken while nothing is recorded
    decoder_.run(pass);
    if (!logits.empty()) {
      decoder_.compute_logits(pass, 0, {logits.data(), 1, vocab_size_, vocab_size_});
    }
    pass.stream.synchronize();
    has_run_ = true;
    return;
  }
  if (!serves(pass)) {
    try {
      record(pass);
    } catch (const DeviceError& error) {
      // Somebody else in the process may have waited for the whole device, which no recording
      // bears.
      if (error.needs_restart()) throw;
      record(pass);
    }
  }
  host_input_->as<std::int32_t>()[0] = pass.token_ids.front();
  host_input_->as<std::int32_t>()[1] =
      static_cast<std::int32_t>(pass.only_sequence().first_position);
  work_->run();
  pass.stream.synchronize();
  std::copy_n(logits_->as<float>(), logits.size(), logits.data());
  decoder_.check_logits(pass, logits);
}

}  // namespace moerun
