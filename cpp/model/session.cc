#include "model/session.h"

#include <algorithm>

#include "base/error.h"

namespace moerun {

Session::Session(std::shared_ptr<Model> model, bool keeps_non_finite)
    : model_(std::move(model)),
      memory_(model_->on_device([this] { return model_->borrow_pass_memory(); })),
      kv_cache_(model_->on_device([this] {
        return KvCache(model_->config(), model_->context_length(), *model_->plan_.backend);
      })),
      keeps_non_finite_(keeps_non_finite) {
  if (!model_->decoder_->needs_no_host()) return;
  graph_ = model_->on_device([this] {
    return std::make_unique<DecodeGraph>(*model_->decoder_, *model_->plan_.backend,
                                         static_cast<std::size_t>(model_->config().vocab_size));
  });
}

Session::~Session() {
  if (model_->is_lost()) {
    static_cast<void>(graph_.release());
    static_cast<void>(memory_.release());
    return;
  }
  model_->make_current();
  graph_.reset();  // recorded on a stream that goes back
  model_->return_pass_memory(std::move(memory_));
}

void Session::append(std::span<const std::int32_t> token_ids, std::span<float> logits,
                     const Checkpointer& between_layers, RoutingRecord* record) {
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  const bool all_logits = logits.size() == token_ids.size() * vocab;
  if (!all_logits && logits.size() != vocab && !logits.empty()) {
    throw InvalidArgument(message("logits: expected room for ", vocab, " or ",
                                  token_ids.size() * vocab, " floats, found ", logits.size()));
  }
  const std::size_t length = token_ids_.size() + token_ids.size();
  if (length > kv_cache_.capacity_tokens()) {
    throw InvalidArgument(message("the sequence would have ", length,
                                  " tokens, but the context holds ", kv_cache_.capacity_tokens()));
  }
  model_->run_alone(*memory_, [&] {
    compute_anew(length, between_layers, record);
    run(token_ids, length, logits, between_layers, record);
  });
  token_ids_.insert(token_ids_.end(), token_ids.begin(), token_ids.end());
}

// It is not enough to rotate the keys anew: those of all layers but the first come from attention
// over keys that were rotated as those of a short text.
void Session::compute_anew(std::size_t length, const Checkpointer& between_layers,
                           RoutingRecord* record) {
  const bool is_whole = num_stored_ == token_ids_.size();
  if (is_whole && (num_stored_ == 0 || is_long_ == model_->decoder_->is_long(length))) return;
  num_stored_ = 0;
  run(token_ids_, length, {}, between_layers, record);
}

void Session::run(std::span<const std::int32_t> token_ids, std::size_t length,
                  std::span<float> logits, const Checkpointer& between_layers,
                  RoutingRecord* record) {
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  const bool all_logits = logits.size() == token_ids.size() * vocab;
  is_long_ = model_->decoder_->is_long(length);
  Workspace& workspace = memory_->workspace;
  for (std::size_t first = 0; first < token_ids.size(); first += workspace.max_tokens()) {
    const std::size_t count = std::min(workspace.max_tokens(), token_ids.size() - first);
    const Decoder::Sequence sequence{&kv_cache_, num_stored_, count, length};
    const bool is_recorded = record != nullptr && num_stored_ + count > record->first_position;
    const Decoder::Pass pass{.stream = *memory_->stream,
                             .workspace = workspace,
                             .token_ids = token_ids.subspan(first, count),
                             .sequences = {&sequence, 1},
                             .is_decoding = token_ids.size() == 1,
                             .between_layers = between_layers ? &between_layers : nullptr,
                             .record = is_recorded ? record : nullptr,
                             .keeps_non_finite = keeps_non_finite_};
    if (graph_ && pass.is_decoding && !is_recorded) {
      graph_->run(pass, logits);
      ++num_stored_;
      continue;
    }
    model_->decoder_->run(pass);
    if (is_recorded && record->options.with_predictions) record_predictions(pass, *record);
    if (all_logits) {
      model_->decoder_->compute_logits(pass, 0,
                                       {logits.data() + first * vocab, count, vocab, vocab});
    } else if (!logits.empty() && first + count == token_ids.size()) {
      model_->decoder_->compute_logits(pass, count - 1, {logits.data(), 1, vocab, vocab});
    }
    num_stored_ += count;
  }
  memory_->stream->synchronize();  // see Model::run_alone()
}

void Session::record_predictions(const Decoder::Pass& pass, RoutingRecord& record) {
  // A few rows at a time: the logits of a whole chunk could be larger than all else.
  constexpr std::size_t kRows = 64;
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  std::vector<float> logits(std::min(kRows, pass.token_ids.size()) * vocab);
  for (std::size_t first = 0; first < pass.token_ids.size(); first += kRows) {
    const std::size_t rows = std::min(kRows, pass.token_ids.size() - first);
    model_->decoder_->compute_logits(pass, first, {logits.data(), rows, vocab, vocab});
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t position = pass.only_sequence().first_position + first + row;
      if (!record.holds(position)) continue;
      const float* of_token = logits.data() + row * vocab;
      record.predicted_ids[position - record.first_position] =
          static_cast<std::int32_t>(std::max_element(of_token, of_token + vocab) - of_token);
    }
  }
}

}  // namespace moerun
