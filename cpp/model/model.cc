#include "model/model.h"

#include <algorithm>
#include <chrono>
#include <iterator>

#include "base/bytes_text.h"
#include "base/cpu_features.h"
#include "base/error.h"
#include "device/cpu/kernel_table.h"
#include "device/cuda_query.h"
#include "expert/memory_store.h"
#include "expert/record_file.h"
#include "io/checkpoint.h"

namespace moerun {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::int64_t kMaxPrefillChunk = 65536;

std::unique_ptr<ExpertStore> open_store(const ModelWeights& weights,
                                        const std::filesystem::path& model,
                                        const std::string& pack_folder,
                                        const LoadProgress& progress,
                                        std::vector<std::string>& notes) {
  if (pack_folder.empty()) return std::make_unique<CheckpointStore>(weights);
  RecordFileLayout layout(weights, model);
  const auto path = layout.path_in(pack_folder);
  for (const RemovedFile& each : write_record_file(weights, layout, pack_folder, progress)) {
    notes.push_back(message("removed ", each.path.string(), " (", bytes_text(each.bytes),
                            "), the record file of weights that this model had before"));
  }
  return std::make_unique<RecordStore>(weights, std::move(layout), path);
}

void check_options(const ModelOptions& options) {
  if (options.threads < 0 || options.threads > kMaxThreads) {
    throw InvalidArgument(
        message("threads: expected 1 to ", kMaxThreads, ", found ", options.threads));
  }
  if (options.prefill_chunk < 1 || options.prefill_chunk > kMaxPrefillChunk) {
    throw InvalidArgument(message("prefill_chunk: expected 1 to ", kMaxPrefillChunk, ", found ",
                                  options.prefill_chunk));
  }
}

// The device comes first: what fits is for it to say.
void open_device(ModelPlan& plan, const ModelOptions& options) {
  plan.threads = options.threads != 0 ? options.threads : num_usable_cpus();
  plan.cpu_kernels = choose_cpu_kernels(options.cpu_kernels).name;
  if (options.make_backend) {
    plan.backend = options.make_backend();
    plan.device = {std::string(plan.backend->name()), "given by the caller"};
    return;
  }
  plan.device = choose_device(options.device, query_cuda());
  plan.backend = make_backend(plan.device, plan.threads, plan.cpu_kernels);
}

// None where the device computes in host memory, or holds every expert itself.
std::optional<HostPlan> plan_host(const ModelPlan& plan, const ModelOptions& options) {
  for (const auto& [name, text] : {std::pair{"pin_limit", options.experts.pin_limit},
                                   std::pair{"host_tier", options.experts.host_tier}}) {
    if (!plan.backend->is_host() || text.empty()) continue;
    throw InvalidArgument(
        message(name, ": needs device cuda, and the model runs on the CPU; leave it out"));
  }
  if (plan.backend->is_host()) return std::nullopt;
  check_host_options(*plan.weights, options.experts);
  if (plan.layout().is_resident) return std::nullopt;
  return plan_host_memory(*plan.weights, options.experts, available_memory_bytes());
}

}  // namespace

ModelPlan plan_model(const std::filesystem::path& path, const ModelOptions& options) {
  ModelPlan plan;
  check_options(options);
  plan.config = load_model_config(path);
  const ModelConfig& config = plan.config;
  if (!config.not_runnable.empty()) {
    throw UnsupportedModel(message(path.string(), ": ", config.not_runnable));
  }
  const auto trained = config.max_position_embeddings;
  if (options.context_length < 0 || options.context_length > trained) {
    throw InvalidArgument(message("context_length: expected 1 to ", trained,
                                  " (the model's max_position_embeddings), found ",
                                  options.context_length));
  }
  plan.context_length =
      static_cast<std::size_t>(options.context_length != 0 ? options.context_length : trained);
  plan.checkpoint = std::make_unique<Checkpoint>(Checkpoint::open(path));
  plan.weights = std::make_unique<ModelWeights>(config, *plan.checkpoint);
  open_device(plan, options);
  plan.memory =
      plan_memory(config, *plan.weights, plan.context_length,
                  static_cast<std::size_t>(options.prefill_chunk), options.experts, *plan.backend);
  plan.host = plan_host(plan, options);
  return plan;
}

Model::Model(ModelPlan plan, const ModelOptions& options)
    : plan_(std::move(plan)), options_(options) {}

std::shared_ptr<Model> Model::load(const std::filesystem::path& path, const ModelOptions& options,
                                   const LoadProgress& progress) {
  const auto begin = std::chrono::steady_clock::now();
  std::shared_ptr<Model> model(new Model(plan_model(path, options), options), DeleteUnlessLost{});
  ModelWeights& weights = *model->plan_.weights;
  const CacheLayout& layout = model->plan_.layout();
  Backend& backend = *model->plan_.backend;
  const bool copies_experts = !layout.is_resident && !backend.is_host();
  std::vector<std::string> notes;
  {
    ThreadPool loaders(model->threads());
    if (copies_experts) {
      model->host_ = take_host_memory(weights, *model->plan_.host, options.experts, backend);
      weights.load(loaders, progress, *model->host_->experts);
    } else {
      weights.load(loaders, progress, layout.is_resident, layout.arena_bytes());
    }
  }
  if (!backend.is_host()) weights.move_to(backend, *backend.make_stream());
  if (!layout.is_resident) {
    if (!copies_experts || model->host_->plan.disk_bytes != 0) {
      model->store_ = open_store(weights, path, options.experts.pack_folder, progress, notes);
    }
    if (copies_experts && model->host_->ring) {
      model->store_ =
          std::make_unique<MemoryStore>(weights, *model->host_->experts, std::move(model->store_));
    }
    if (model->store_ && options.experts.wrap_store) {
      model->store_ = options.experts.wrap_store(std::move(model->store_));
    }
    model->cache_ = std::make_unique<ExpertCache>(
        weights, layout, model->store_.get(), model->host_ ? &*model->host_ : nullptr,
        options.experts, options.experts.log_events ? &model->events_ : nullptr, backend);
  }
  model->decoder_ = std::make_unique<Decoder>(model->config(), weights, backend,
                                              model->cache_.get(), options.decoder);
  if (model->cache_) model->warm_cache(progress);
  std::ranges::copy(weights.notes(), std::back_inserter(notes));
  if (model->host_) std::ranges::copy(model->host_->plan.notes, std::back_inserter(notes));
  const auto end = std::chrono::steady_clock::now();
  model->load_stats_ = {std::chrono::duration<double>(end - begin).count(),
                        model->plan_.weights->bytes_read(), std::move(notes)};
  return model;
}

// With what the plan wants to be there from the start.
void Model::warm_cache(const LoadProgress& progress) {
  const CacheLayout& layout = plan_.layout();
  std::uint64_t total = 0;
  for (const LayerLayout& layer : layout.layers) {
    total += layer.warm_experts.size() * layer.slot_bytes;
  }
  if (total == 0) return;
  on_device([&] {
    const auto stream = plan_.backend->make_stream();
    cache_->begin_pass(*stream);
    std::uint64_t done = 0;
    const auto report = [&] {
      if (progress) progress(done, total);
    };
    for (const LayerLayout& layer : layout.layers) {
      cache_->warm(layer.layer, layer.warm_experts, report);
      done += layer.warm_experts.size() * layer.slot_bytes;
    }
    report();
  });
}

Reconfiguration Model::reconfigure(const std::string& plan, const std::string& plan_text,
                                   const Checkpointer& while_waiting) {
  const Use use(*this);
  if (!cache_) {
    throw InvalidArgument(
        "reconfigure: every expert is in memory, so there is no cache to change; load the model "
        "with a smaller expert_budget to have one");
  }
  ExpertCacheOptions options = options_.experts;
  options.budget.clear();
  // A plan says the policy, but for one that goes with any plan.
  options.policy = cache_->layout().is_pool ? cache_->layout().policy : "";
  options.split.clear();
  options.plan = plan;
  options.plan_text = plan_text;
  const CacheLayout next =
      make_cache_layout(*plan_.weights, static_cast<std::size_t>(config().top_k), options, 0);
  const std::lock_guard lock(step_mutex_);
  return on_device([&] {
    const auto stream = plan_.backend->make_stream();
    cache_->begin_pass(*stream);
    return cache_->reconfigure(next, while_waiting);
  });
}

void Model::check_prompt(std::span<const std::int32_t> token_ids) const {
  if (token_ids.empty())
    throw InvalidArgument("token_ids: expected at least one token, found none");
  if (token_ids.size() > context_length()) {
    throw InvalidArgument(message("token_ids: the prompt has ", token_ids.size(),
                                  " tokens, but the context holds ", context_length()));
  }
  for (std::size_t i = 0; i < token_ids.size(); ++i) {
    if (token_ids[i] < 0 || token_ids[i] >= config().vocab_size) {
      throw InvalidArgument(message("token_ids[", i, "]: expected 0 to ", config().vocab_size - 1,
                                    ", found ", token_ids[i]));
    }
  }
}

TransferTiming Model::measure_transfers(std::size_t layer, std::span<const std::size_t> experts,
                                        std::size_t first_record,
                                        const Checkpointer& while_waiting) {
  const Use use(*this);
  if (!cache_) {
    throw InvalidArgument(
        "every expert of this model is in memory, so no transfer can be measured; load it with an "
        "expert_budget below all of them");
  }
  const std::lock_guard lock(step_mutex_);
  return on_device([&] {
    const auto stream = plan_.backend->make_stream();
    cache_->begin_pass(*stream);
    const TransferTiming timing =
        cache_->measure_transfers(layer, experts, first_record, while_waiting);
    stream->synchronize();
    return timing;
  });
}

void Model::settle(PassMemory& memory) noexcept {
  try {
    memory.stream->synchronize();
  } catch (...) {  // what interrupted the pass is what is reported
  }
}

std::unique_ptr<PassMemory> Model::borrow_pass_memory() {
  {
    const std::lock_guard lock(memory_mutex_);
    if (idle_memory_) return std::move(idle_memory_);
  }
  return std::make_unique<PassMemory>(PassMemory{
      plan_.backend->make_stream(), Workspace(config(), max_pass_tokens(), *plan_.backend)});
}

void Model::check_process() const {
  if (plan_.backend->is_host()) return origin_.check_usable("the model");
  origin_.check_this_process("the model (device " + device() + ")");
}

bool Model::is_lost() const noexcept {
  return origin_.is_lost() ||
         (!origin_.is_this_process() && plan_.backend && !plan_.backend->is_host());
}

void Model::check_open() const {
  check_process();
  const std::lock_guard lock(failure_mutex_);
  if (!failure_) return;
  throw DeviceError(message("the model was closed after a device error: ", failure_->what(),
                            failure_->needs_restart() ? "" : "; load it again"),
                    failure_->needs_restart());
}

void Model::close(const DeviceError& cause) noexcept {
  const std::lock_guard lock(failure_mutex_);
  if (!failure_) failure_ = cause;
}

void Model::make_current() noexcept {
  try {
    plan_.backend->make_current();
  } catch (...) {  // what is freed then fails, too, and frees what it can
  }
}

Model::~Model() {
  if (plan_.backend) make_current();
}

void Model::return_pass_memory(std::unique_ptr<PassMemory> memory) noexcept {
  const std::lock_guard lock(memory_mutex_);
  idle_memory_ = std::move(memory);  // of two that end, one is enough
}

std::optional<GenerationStats> Model::generation_stats() const {
  const std::lock_guard lock(stats_mutex_);
  return generation_stats_;
}

void Model::publish(const GenerationStats& stats) {
  const std::lock_guard lock(stats_mutex_);
  generation_stats_ = stats;
}

std::optional<BatchStats> Model::batch_stats() const {
  const std::lock_guard lock(stats_mutex_);
  return batch_stats_;
}

void Model::publish(const BatchStats& stats) {
  const std::lock_guard lock(stats_mutex_);
  batch_stats_ = stats;
}

}  // namespace moerun
