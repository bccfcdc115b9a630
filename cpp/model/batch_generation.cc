#include "model/batch_generation.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/bytes_text.h"
#include "base/error.h"
#include "expert/budget_text.h"

namespace moerun {
namespace {

constexpr std::size_t kDefaultBatchSize = 16;

bool is_scheduled(const BatchOptions& options) { return options.schedule != ScheduleMode::off; }

std::size_t kv_budget_bytes(const Model& model, const BatchOptions& options,
                            std::size_t free_bytes) {
  const std::size_t slab = KvArena::slab_bytes(model.config(), model.context_length());
  const std::size_t all = batch_capacity(options.batch_size, options.schedule) * slab;
  if (options.kv_budget.empty()) return std::min(all, free_bytes / 2);
  const std::size_t bytes = std::min(all, parse_kv_budget(options.kv_budget, all));
  if (bytes <= free_bytes) return bytes;
  throw OutOfMemory(message("kv_budget asks for ", bytes_text(bytes), ", but ",
                            bytes_text(free_bytes),
                            " of memory are free; give a smaller one, or a smaller batch_size"));
}

}  // namespace

BatchGeneration::BatchGeneration(std::shared_ptr<Model> model, const BatchOptions& options)
    : model_(std::move(model)), options_(options) {
  const Model::Use use(*model_);
  if (model_->options().decoder.replay) {
    throw InvalidArgument("a batch cannot run with a replayed routing, which is of one sequence");
  }
  const std::size_t max_tokens = model_->max_pass_tokens();
  if (options_.batch_size == 0) options_.batch_size = std::min(kDefaultBatchSize, max_tokens);
  if (options_.batch_size > max_tokens) {
    throw InvalidArgument(message("batch_size: expected 1 to ", max_tokens,
                                  " (as many tokens as may go through the layers together: "
                                  "prefill_chunk, at most context_length), found ",
                                  options_.batch_size));
  }
  Backend& backend = *model_->plan_.backend;
  memory_ = model_->on_device([this] { return model_->borrow_pass_memory(); });
  model_->on_device([&] {
    arena_.emplace(model_->config(),
                   kv_budget_bytes(*model_, options_, backend.memory().free_bytes), backend);
  });
  if (is_scheduled(options_) && options_.predictor.empty()) {
    throw InvalidArgument(
        "schedule: it needs a predictor of the experts that texts will use; train one with "
        "moe-predictor, or switch it off");
  }
  if (!options_.predictor.empty()) {
    // On one thread: it has to share the cores with the step beside which it works.
    auto paths = std::make_unique<SequencePaths>(options_.predictor, options_.expected,
                                                 make_cpu_backend(1, model_->cpu_kernels()));
    // Else it was only looked at.
    if (is_scheduled(options_) || model_->cache_layout().is_pool) {
      outlook_ = std::make_unique<BatchOutlook>(std::move(paths), options_.schedule,
                                                /*in_background=*/true);
      stats_.schedule = outlook_->schedule_stats();
      stats_.prediction = outlook_->stats();
    }
  }
  logits_.resize(capacity() * static_cast<std::size_t>(model_->config().vocab_size));
}

std::size_t BatchGeneration::capacity() const {
  return batch_capacity(options_.batch_size, options_.schedule);
}

BatchGeneration::~BatchGeneration() {
  model_->make_current();
  end_all();
  arena_.reset();
  if (memory_) model_->return_pass_memory(std::move(memory_));
}

void BatchGeneration::end_all() noexcept {
  const std::lock_guard lock(mutex_);
  stats_.finished += running_.size() + waiting_.size();
  running_.clear();
  waiting_.clear();
  cancelled_.clear();
  if (outlook_) outlook_->clear();
  is_stepping_ = false;
  resume_trials();
  try {
    model_->publish(guarded_stats());
  } catch (...) {  // only what is told is lost
  }
}

std::size_t BatchGeneration::add(std::vector<std::int32_t> prompt, const GenerationParams& params) {
  const Model::Use use(*model_);
  model_->check_prompt(prompt);
  if (params.max_new_tokens == 0) {
    throw InvalidArgument("max_new_tokens: expected at least 1, found 0");
  }
  const std::size_t context = model_->context_length();
  // Of the answer's last token no keys are kept.
  const std::size_t answer = std::min(params.max_new_tokens, context - prompt.size() + 1);
  const std::size_t max_tokens = prompt.size() + answer - 1;
  const std::size_t bytes = arena_->slab_bytes(max_tokens);
  if (bytes > arena_->bytes()) {
    throw InvalidArgument(
        message("the prompt of ", prompt.size(), " tokens with up to ", answer, " new ones needs ",
                bytes_text(bytes), " of KV cache, but the KV budget is ",
                bytes_text(arena_->bytes()), "; ask for fewer tokens, or give a larger budget"));
  }
  check_sampling_params(params.sampling);
  Entry entry;
  entry.token_ids = std::move(prompt);
  entry.params = params;
  entry.max_tokens = max_tokens;
  const std::lock_guard lock(mutex_);
  entry.number = num_added_;
  waiting_.push_back(std::move(entry));
  return num_added_++;
}

void BatchGeneration::cancel(std::size_t sequence) {
  const Model::Use use(*model_);
  const std::lock_guard lock(mutex_);
  if (is_stepping_) {
    cancelled_.push_back(sequence);
    return;
  }
  end(sequence);
  model_->publish(guarded_stats());
}

void BatchGeneration::end(std::size_t sequence) {
  const auto is_it = [&](const Entry& entry) { return entry.number == sequence; };
  stats_.finished += std::erase_if(waiting_, is_it) + std::erase_if(running_, is_it);
  if (outlook_) outlook_->remove(sequence);
}

// In the order of their arrival: a long one is not passed by, or it might wait for ever.
std::vector<BatchGeneration::Entry> BatchGeneration::join() {
  std::vector<Entry> joined;
  while (!waiting_.empty() && running_.size() + joined.size() < capacity()) {
    auto kv = arena_->try_take(waiting_.front().max_tokens);
    if (!kv) break;
    joined.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
    Entry& entry = joined.back();
    entry.kv = std::move(kv);
    entry.sampler.emplace(entry.params.sampling,
                          static_cast<std::size_t>(model_->config().vocab_size));
    for (const std::int32_t token : entry.token_ids) entry.sampler->observe(token);
  }
  return joined;
}

std::vector<BatchToken> BatchGeneration::step(const Checkpointer& between_layers) {
  const Model::Use use(*model_);
  model_->check_open();
  std::vector<Entry> joined;
  {
    const std::lock_guard lock(mutex_);
    if (is_stepping_) throw InvalidArgument("step: another thread is in a step of this batch");
    joined = join();
    is_stepping_ = true;
  }
  std::vector<BatchToken> tokens;
  try {
    if (!joined.empty()) {
      run_prompts(joined, between_layers, tokens);
      const std::lock_guard lock(mutex_);
      for (const Entry& entry : joined) {
        if (!outlook_) break;
        outlook_->add(entry.number, std::span(entry.token_ids).first(entry.token_ids.size() - 1));
        outlook_->append(entry.number, entry.token_ids.back());
      }
      std::move(joined.begin(), joined.end(), std::back_inserter(running_));
    } else if (!running_.empty()) {
      run_step(between_layers, tokens);
    }
  } catch (...) {
    {
      const std::lock_guard lock(mutex_);
      joined.clear();
    }
    end_all();
    throw;
  }
  end_step(tokens);
  return tokens;
}

void BatchGeneration::end_step(std::vector<BatchToken>& tokens) {
  const std::lock_guard lock(mutex_);
  is_stepping_ = false;
  resume_trials();
  if (outlook_) {
    stats_.schedule = outlook_->schedule_stats();
    stats_.prediction = outlook_->stats();
  }
  stats_.most_running = std::max(stats_.most_running, running_.size());
  for (const std::size_t sequence : std::exchange(cancelled_, {})) {
    std::erase_if(tokens, [&](const BatchToken& token) { return token.sequence == sequence; });
    end(sequence);
  }
  for (const BatchToken& token : tokens) {
    if (token.is_last) end(token.sequence);
  }
  model_->publish(guarded_stats());
}

void BatchGeneration::run_prompts(std::span<Entry> joined, const Checkpointer& between_layers,
                                  std::vector<BatchToken>& tokens) {
  const double begin = clock_.now();
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  std::vector<std::size_t> lengths;
  for (const Entry& entry : joined) lengths.push_back(entry.token_ids.size());
  for (const auto& pass : prompt_passes(lengths, memory_->workspace.max_tokens())) {
    std::vector<Piece> pieces;
    for (const PromptPiece& each : pass) pieces.push_back({&joined[each.prompt], each.num_tokens});
    run_pass(pieces, /*is_decoding=*/false, between_layers);
    float* logits = logits_.data();
    for (const PromptPiece& each : pass) {
      if (!each.is_last) continue;
      tokens.push_back(sample(joined[each.prompt], {logits, vocab}));
      logits += vocab;
    }
  }
  const std::lock_guard lock(mutex_);
  stats_.prompt_tokens += std::accumulate(lengths.begin(), lengths.end(), std::size_t{0});
  stats_.generated_tokens += tokens.size();
  stats_.prefill_seconds += clock_.now() - begin;
}

void BatchGeneration::run_step(const Checkpointer& between_layers,
                               std::vector<BatchToken>& tokens) {
  const double begin = clock_.now();
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  const std::vector<Entry*> batch = next_batch();
  const double begin_anew = clock_.now();
  compute_anew(batch, between_layers);
  const double anew_s = clock_.now() - begin_anew;
  std::vector<Piece> pieces;
  for (Entry* entry : batch) pieces.push_back({entry, 1});
  run_pass(pieces, /*is_decoding=*/true, between_layers);
  if (outlook_) outlook_->finish_step(clock_.now() - begin - anew_s);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    tokens.push_back(sample(*batch[i], {logits_.data() + i * vocab, vocab}));
    if (outlook_) outlook_->append(batch[i]->number, batch[i]->token_ids.back());
  }
  const std::lock_guard lock(mutex_);
  ++stats_.steps;
  stats_.decode_tokens += tokens.size();
  stats_.generated_tokens += tokens.size();
  stats_.decode_seconds += clock_.now() - begin;
}

// The sequences of the next step, whose experts are being predicted from now on.
std::vector<BatchGeneration::Entry*> BatchGeneration::next_batch() {
  std::vector<Entry*> batch;
  std::vector<std::size_t> numbers;
  for (Entry& entry : running_) {
    numbers.push_back(entry.number);
    batch.push_back(&entry);
  }
  if (!outlook_) return batch;
  ExpertCache* cache = model_->cache_.get();
  numbers = choose_batch(outlook_.get(), cache, numbers, options_.batch_size);
  outlook_->begin_step(cache != nullptr && cache->wants_paths());
  std::erase_if(batch, [&](const Entry* entry) {
    return std::find(numbers.begin(), numbers.end(), entry->number) == numbers.end();
  });
  return batch;
}

// As a Session does it: all keys of a sequence are rotated for its length, before its next token.
void BatchGeneration::compute_anew(std::span<Entry* const> batch,
                                   const Checkpointer& between_layers) {
  const Decoder& decoder = *model_->decoder_;
  std::vector<Entry*> grown;
  std::vector<std::size_t> lengths;
  for (Entry* entry : batch) {
    if (decoder.is_long(entry->num_stored) == decoder.is_long(entry->token_ids.size())) continue;
    grown.push_back(entry);
    lengths.push_back(std::exchange(entry->num_stored, 0));
  }
  for (const auto& pass : prompt_passes(lengths, memory_->workspace.max_tokens())) {
    std::vector<Piece> pieces;
    for (const PromptPiece& each : pass) pieces.push_back({grown[each.prompt], each.num_tokens});
    run_pass(pieces, /*is_decoding=*/false, between_layers);
  }
}

// Only the batch's own steps are no place for them.
void BatchGeneration::resume_trials() noexcept {
  if (outlook_ && model_->cache_) model_->cache_->pause_trials(false);
}

// Leaves the logits of every piece that ends with its entry's last token in logits_.
void BatchGeneration::run_pass(std::span<const Piece> pieces, bool is_decoding,
                               const Checkpointer& between_layers) {
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  std::vector<std::int32_t> token_ids;
  std::vector<Decoder::Sequence> sequences;
  std::vector<std::size_t> last_rows;
  for (const auto& [entry, count] : pieces) {
    const auto next = std::span(entry->token_ids).subspan(entry->num_stored, count);
    token_ids.insert(token_ids.end(), next.begin(), next.end());
    const std::size_t length = entry->token_ids.size();
    sequences.push_back({&entry->kv->cache(), entry->num_stored, count, length});
    if (entry->num_stored + count == length) last_rows.push_back(token_ids.size() - 1);
  }
  model_->run_alone(*memory_, [&] {
    Backend& backend = *model_->plan_.backend;
    Decoder::Pass pass{*memory_->stream, memory_->workspace,
                       token_ids,        sequences,
                       is_decoding,      between_layers ? &between_layers : nullptr};
    pass.forecasts = outlook_.get();
    const auto active = model_->active_counts().snapshot();
    const CacheTotals cache = cache_totals(model_->expert_cache());
    model_->decoder_->run(pass);
    if (is_decoding) count_step(active, cache);
    const Activations& normed = memory_->workspace.normed;
    for (std::size_t i = 0; i < last_rows.size(); ++i) {  // in order: no row is lost
      if (last_rows[i] == i) continue;
      backend.copy(pass.stream, reinterpret_cast<std::byte*>(normed.row(i)),
                   reinterpret_cast<const std::byte*>(normed.row(last_rows[i])),
                   normed.cols * sizeof(float));
    }
    if (!last_rows.empty()) {
      model_->decoder_->compute_logits(pass, 0, {logits_.data(), last_rows.size(), vocab, vocab});
    }
    memory_->stream->synchronize();
  });
  for (const auto& [entry, count] : pieces) entry->num_stored += count;
}

BatchToken BatchGeneration::sample(Entry& entry, std::span<float> logits) {
  const std::int32_t token = entry.sampler->sample(logits);
  entry.sampler->observe(token);
  entry.token_ids.push_back(token);
  ++entry.num_generated;
  const auto& stops = entry.params.stop_token_ids;
  const bool is_last = std::find(stops.begin(), stops.end(), token) != stops.end() ||
                       entry.num_generated == entry.params.max_new_tokens ||
                       entry.num_stored == model_->context_length();
  return {entry.number, token, is_last};
}

// What the step added to what stood before it.
void BatchGeneration::count_step(const ActiveExpertCounts::Snapshot& active,
                                 const CacheTotals& cache) {
  const auto active_now = model_->active_counts().snapshot();
  const CacheTotals cache_now = cache_totals(model_->expert_cache());
  const std::lock_guard lock(mutex_);
  if (active_now.steps != active.steps) {
    stats_.active_experts.resize(active.of_layers.size());
    for (std::size_t i = 0; i < active.of_layers.size(); ++i) {
      stats_.active_experts[i] += active_now.of_layers[i] - active.of_layers[i];
    }
  }
  count_cache(stats_, cache, cache_now);
}

BatchStats BatchGeneration::stats() const {
  const Model::Use use(*model_);
  const std::lock_guard lock(mutex_);
  return guarded_stats();
}

BatchStats BatchGeneration::guarded_stats() const {
  BatchStats stats = stats_;
  stats.waiting = waiting_.size();
  stats.running = running_.size();
  stats.kv_budget_bytes = arena_->bytes();
  stats.kv_used_bytes = arena_->used_bytes();
  stats.kv_peak_bytes = arena_->peak_bytes();
  return stats;
}

}  // namespace moerun
