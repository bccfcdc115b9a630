#include "weights/model_weights.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "weights/host_experts.h"
#include "weights/tensor_contents.h"
#include "weights/tensor_names.h"

namespace moerun {

ConstBytes LayerWeights::records_of(std::size_t expert) const {
  const bool shared = experts.is_shared(expert);
  const MatrixView& all = shared ? shared_records : expert_records;
  const std::size_t rows = 3 * experts.num_records(expert);
  return {all.row(shared ? 0 : expert * rows), rows * all.row_bytes()};
}

namespace {

MatrixView record_view(DType dtype, std::size_t records, std::size_t hidden) {
  return {nullptr, dtype, 3 * records, hidden, padded(hidden)};
}

// Plans one expert into records: gate and up rows as they are, down transposed.
void add_records(LoadPlan& plan, const ExpertFiles& files, std::byte* records,
                 const MatrixView& view) {
  const std::size_t row_bytes = view.row_bytes();
  plan.add_rows(files.gate, {records, 3 * row_bytes, view.dtype});
  plan.add_rows(files.up, {records + row_bytes, 3 * row_bytes, view.dtype});
  plan.add_transposed(files.down, {records + 2 * row_bytes, 3 * row_bytes, view.dtype});
}

}  // namespace

// Fills the views of a ModelWeights and plans what to read.
class WeightsBuilder {
 public:
  WeightsBuilder(ModelWeights& weights, const ModelConfig& config, const Checkpoint& checkpoint)
      : weights_(weights),
        config_(config),
        checkpoint_(checkpoint),
        names_(config, checkpoint),
        plan_(weights.plan_) {}

  void build() {
    const auto hidden = size(config_.hidden_size);
    const auto vocab = size(config_.vocab_size);
    const bool is_tied = ties_head();
    // Of tied weights a file may have either.
    const bool has_embedding = !is_tied || checkpoint_.find(names_.embedding()) != nullptr;
    weights_.embedding =
        matrix({has_embedding ? names_.embedding() : head_weight()}, {vocab}, hidden);
    weights_.layers.reserve(size(config_.num_hidden_layers));
    for (std::int64_t index = 0; index < config_.num_hidden_layers; ++index) add_layer(index);
    weights_.final_norm = norm(names_.final_norm());
    weights_.lm_head.weight =
        is_tied ? weights_.embedding : matrix({head_weight()}, {vocab}, hidden);
    used_.insert(head_weight());
    if (config_.lm_head_bias) weights_.lm_head.bias = vector({names_.lm_head() + ".bias"}, {vocab});
    refuse_unknown_tensors();
  }

 private:
  std::string head_weight() const { return names_.lm_head() + ".weight"; }

  // Config and files may disagree on whether the head is the embedding. As transformers does it, a
  // head that is there and differs is used, whatever the config says.
  bool ties_head() {
    const TensorRef* head = checkpoint_.find(head_weight());
    const TensorRef* embedding = checkpoint_.find(names_.embedding());
    const std::string config = (checkpoint_.directory() / "config.json").string();
    if (!config_.tie_word_embeddings) {
      if (head != nullptr || embedding == nullptr) return false;
      throw FormatError(message(
          config, ": field 'tie_word_embeddings' is false, but ", checkpoint_.directory().string(),
          " has no tensor '", head_weight(), "' beside '", names_.embedding(),
          "'; set the field to true if the model shares them, or download the missing weights"));
    }
    if (head == nullptr || embedding == nullptr) return true;
    if (head->info->shape == embedding->info->shape && is_same_data(*head, *embedding)) return true;
    weights_.notes_.push_back(
        message(config, ": field 'tie_word_embeddings' is true, but tensor '", head_weight(),
                "' of ", head->file->path().string(), " differs from '", names_.embedding(),
                "': both are used, as transformers does; set the field to false to silence this"));
    return false;
  }

  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

  TensorRef require(const std::string& name, const std::vector<std::uint64_t>& shape) {
    used_.insert(name);
    return checkpoint_.require(name, shape);
  }

  std::byte* allocate(std::size_t bytes, std::string_view what) {
    weights_.resident_bytes_ += bytes;
    weights_.memory_.emplace_back(bytes, what);
    return weights_.memory_.back().data();
  }

  // Stacks tensors of (rows[i], cols) into one matrix.
  MatrixView matrix(const std::vector<std::string>& tensors, const std::vector<std::size_t>& rows,
                    std::size_t cols) {
    std::vector<TensorRef> refs;
    MatrixView view;
    view.cols = cols;
    view.pitch = padded(cols);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      refs.push_back(require(tensors[i], {rows[i], cols}));
      view.rows += rows[i];
    }
    // Tensors of different types meet in float32, which holds both exactly.
    view.dtype = *refs.front().info->dtype;
    for (const auto& ref : refs) {
      if (*ref.info->dtype != view.dtype) view.dtype = DType::f32;
    }
    std::byte* data = allocate(view.bytes(), tensors.front());
    view.data = data;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      plan_.add_rows({refs[i].file, refs[i].info->offset, *refs[i].info->dtype, rows[i], cols},
                     {data, view.row_bytes(), view.dtype});
      data += rows[i] * view.row_bytes();
    }
    return view;
  }

  // Joins vectors into one of float32.
  const float* vector(const std::vector<std::string>& tensors,
                      const std::vector<std::size_t>& lengths) {
    std::size_t total = 0;
    for (const std::size_t length : lengths) total += length;
    weights_.vectors_.emplace_back(padded(total), 0.0f);
    weights_.resident_bytes_ += padded(total) * sizeof(float);
    float* data = weights_.vectors_.back().data();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const TensorRef ref = require(tensors[i], {lengths[i]});
      plan_.add_rows({ref.file, ref.info->offset, *ref.info->dtype, 1, lengths[i]},
                     {reinterpret_cast<std::byte*>(data), lengths[i] * sizeof(float), DType::f32});
      data += lengths[i];
    }
    return weights_.vectors_[weights_.vectors_.size() - 1].data();
  }

  NormWeights norm(const std::string& prefix, std::size_t length = 0) {
    if (length == 0) length = size(config_.hidden_size);
    NormWeights weights;
    weights.kind = config_.norm;
    weights.eps = static_cast<float>(config_.norm_eps);
    weights.weight = vector({prefix + ".weight"}, {length});
    if (config_.norm == NormKind::layer) weights.bias = vector({prefix + ".bias"}, {length});
    return weights;
  }

  void add_layer(std::int64_t index) {
    LayerWeights layer;
    const auto hidden = size(config_.hidden_size);
    const auto head_dim = size(config_.head_dim);
    const auto q_rows = size(config_.num_attention_heads) * head_dim;
    const auto kv_rows = size(config_.num_key_value_heads) * head_dim;
    const std::string attention = names_.layer(index, "self_attn.");
    layer.input_norm = norm(names_.layer(index, "input_layernorm"));
    layer.post_attention_norm = norm(names_.layer(index, "post_attention_layernorm"));
    layer.qkv.weight = matrix(
        {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"},
        {q_rows, kv_rows, kv_rows}, hidden);
    if (config_.qkv_bias) {
      layer.qkv.bias =
          vector({attention + "q_proj.bias", attention + "k_proj.bias", attention + "v_proj.bias"},
                 {q_rows, kv_rows, kv_rows});
    }
    layer.o_proj.weight = matrix({attention + "o_proj.weight"}, {hidden}, q_rows);
    if (config_.o_bias) layer.o_proj.bias = vector({attention + "o_proj.bias"}, {hidden});
    if (config_.qk_norm != QkNorm::none) {
      const bool per_head = config_.qk_norm == QkNorm::per_head;
      layer.q_norm = norm(attention + "q_norm", per_head ? head_dim : q_rows);
      layer.k_norm = norm(attention + "k_norm", per_head ? head_dim : kv_rows);
    }
    layer.experts.hidden_size = hidden;
    if (config_.is_moe_layer[size(index)]) {
      add_experts(index, layer);
    } else {
      layer.experts.shared_intermediate_size = size(config_.dense_intermediate_size);
      add_shared_expert(names_.layer(index, "mlp."), layer);
    }
    weights_.layers.push_back(layer);
  }

  void add_experts(std::int64_t index, LayerWeights& layer) {
    ExpertShape& shape = layer.experts;
    shape.num_experts = size(config_.num_experts);
    shape.intermediate_size = size(config_.moe_intermediate_size);
    layer.router = matrix({names_.router(index)}, {shape.num_experts}, shape.hidden_size);
    const auto found = names_.experts(index);
    if (found.fused) {
      add_fused_experts(found, layer);
    } else {
      add_single_experts(index, layer);
    }
    if (config_.shared_expert_intermediate_size != 0) {
      shape.shared_intermediate_size = size(config_.shared_expert_intermediate_size);
      add_shared_expert(names_.layer(index, "mlp.shared_expert."), layer);
      layer.shared_gate =
          matrix({names_.layer(index, "mlp.shared_expert_gate.weight")}, {1}, shape.hidden_size);
    }
  }

  static FileMatrix file_matrix(const TensorRef& ref, std::size_t rows, std::size_t cols,
                                std::size_t skip_elements = 0) {
    const DType dtype = *ref.info->dtype;
    return {ref.file, ref.info->offset + skip_elements * size_of(dtype), dtype, rows, cols};
  }

  void add_single_experts(std::int64_t index, LayerWeights& layer) {
    ExpertShape& shape = layer.experts;
    const std::size_t hidden = shape.hidden_size;
    const std::size_t inter = shape.intermediate_size;
    struct Parts {
      TensorRef gate, up, down;
    };
    std::vector<Parts> experts;
    std::set<DType> dtypes;
    for (std::int64_t e = 0; e < config_.num_experts; ++e) {
      experts.push_back({require(names_.expert(index, e, "gate"), {inter, hidden}),
                         require(names_.expert(index, e, "up"), {inter, hidden}),
                         require(names_.expert(index, e, "down"), {hidden, inter})});
      for (const auto& ref : {experts.back().gate, experts.back().up, experts.back().down}) {
        dtypes.insert(*ref.info->dtype);
      }
    }
    shape.dtype = dtypes.size() == 1 ? *dtypes.begin() : DType::f32;
    for (const auto& [gate, up, down] : experts) {
      layer.expert_files.push_back({file_matrix(gate, inter, hidden),
                                    file_matrix(up, inter, hidden),
                                    file_matrix(down, hidden, inter)});
    }
  }

  void add_fused_experts(const TensorNames::Experts& names, LayerWeights& layer) {
    ExpertShape& shape = layer.experts;
    const std::size_t hidden = shape.hidden_size;
    const std::size_t inter = shape.intermediate_size;
    const TensorRef gate_up = require(names.gate_up, {shape.num_experts, 2 * inter, hidden});
    const TensorRef down = require(names.down, {shape.num_experts, hidden, inter});
    shape.dtype = *gate_up.info->dtype == *down.info->dtype ? *down.info->dtype : DType::f32;
    for (std::size_t e = 0; e < shape.num_experts; ++e) {
      layer.expert_files.push_back(
          {file_matrix(gate_up, inter, hidden, e * 2 * inter * hidden),
           file_matrix(gate_up, inter, hidden, (e * 2 + 1) * inter * hidden),
           file_matrix(down, hidden, inter, e * inter * hidden)});
    }
  }

  // `prefix` + "gate_proj.weight" and so on: a shared expert, or the MLP of a dense layer.
  void add_shared_expert(const std::string& prefix, LayerWeights& layer) {
    ExpertShape& shape = layer.experts;
    const std::size_t hidden = shape.hidden_size;
    const std::size_t inter = shape.shared_intermediate_size;
    const TensorRef gate = require(prefix + "gate_proj.weight", {inter, hidden});
    const TensorRef up = require(prefix + "up_proj.weight", {inter, hidden});
    const TensorRef down = require(prefix + "down_proj.weight", {hidden, inter});
    const bool same = *gate.info->dtype == *up.info->dtype && *up.info->dtype == *down.info->dtype;
    shape.shared_dtype = same ? *gate.info->dtype : DType::f32;
    layer.shared_records = record_view(shape.shared_dtype, inter, hidden);
    std::byte* data = allocate(layer.shared_records.bytes(), prefix);
    layer.shared_records.data = data;
    add_records(plan_,
                {file_matrix(gate, inter, hidden), file_matrix(up, inter, hidden),
                 file_matrix(down, hidden, inter)},
                data, layer.shared_records);
  }

  // A tensor of a known part that nothing here reads means a computation that nothing here does.
  void refuse_unknown_tensors() const {
    const auto is_of_part = [](const std::string& name) {
      return name.starts_with("model.layers.") || name.starts_with("model.norm.") ||
             name.starts_with("model.embed_tokens.") || name.starts_with("lm_head.");
    };
    for (const auto& name : checkpoint_.names()) {
      const bool derived = name.size() > 8 && name.find("rotary_emb.inv_freq") != std::string::npos;
      if (!is_of_part(name) || derived || used_.contains(name)) continue;
      throw UnsupportedModel(message(
          checkpoint_.find(name)->file->path().string(), ": tensor '", name, "' is not part of a '",
          config_.model_type, "' model with ", config_.num_hidden_layers,
          " layers as this version knows it; running without it would give wrong text"));
    }
  }

  ModelWeights& weights_;
  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  TensorNames names_;
  LoadPlan& plan_;
  std::set<std::string, std::less<>> used_;
};

ModelWeights::ModelWeights(const ModelConfig& config, const Checkpoint& checkpoint)
    : checkpoint_(checkpoint) {
  WeightsBuilder(*this, config, checkpoint).build();
  for (const LayerWeights& layer : layers) {
    expert_bytes_ += layer.experts.num_experts * layer.bytes_per_expert();
  }
}

ModelWeights::~ModelWeights() = default;

std::size_t ModelWeights::moe_index(std::size_t layer) const {
  return static_cast<std::size_t>(
      std::count_if(layers.begin(), layers.begin() + static_cast<std::ptrdiff_t>(layer),
                    [](const auto& each) { return each.experts.num_experts != 0; }));
}

void ModelWeights::load(ThreadPool& pool, const LoadProgress& progress, bool with_experts,
                        std::size_t cache_bytes) {
  check_memory(with_experts ? expert_bytes_ : cache_bytes);
  for (LayerWeights& layer : layers) {
    const ExpertShape& shape = layer.experts;
    if (!with_experts || shape.num_experts == 0) continue;
    layer.expert_records =
        record_view(shape.dtype, shape.intermediate_size * shape.num_experts, shape.hidden_size);
    memory_.emplace_back(layer.expert_records.bytes(), "experts");
    std::byte* data = memory_.back().data();
    layer.expert_records.data = data;
    for (const ExpertFiles& expert : layer.expert_files) {
      add_records(plan_, expert, data, layer.expert_records);
      data += layer.bytes_per_expert();
    }
  }
  run_plan(pool, progress);
}

void ModelWeights::load(ThreadPool& pool, const LoadProgress& progress,
                        const HostExperts& experts) {
  check_memory(experts.pageable_bytes());  // what is page-locked has been taken
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const ExpertShape& shape = layers[layer].experts;
    const MatrixView view = record_view(shape.dtype, shape.intermediate_size, shape.hidden_size);
    for (std::size_t expert = 0; expert < shape.num_experts; ++expert) {
      if (experts.place_of({layer, expert}) == HostExperts::Place::file) continue;
      add_records(plan_, layers[layer].expert_files[expert],
                  experts.records_of({layer, expert}).data(), view);
    }
  }
  run_plan(pool, progress);
}

void ModelWeights::check_memory(std::size_t expert_bytes) const {
  const std::size_t needed = resident_bytes_ + expert_bytes;
  const std::size_t available = available_memory_bytes();
  if (needed <= available) return;
  constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;
  const auto gib = [](std::size_t bytes) {
    return std::round(static_cast<double>(bytes) / kGiB * 100.0) / 100.0;
  };
  throw OutOfMemory(message(checkpoint_.directory().string(), ": the weights need ", gib(needed),
                            " GiB of memory (experts ", gib(expert_bytes), ", the rest ",
                            gib(resident_bytes_), "), but only ", gib(available),
                            " GiB are free; give a smaller expert budget"));
}

void ModelWeights::run_plan(ThreadPool& pool, const LoadProgress& progress) {
  plan_.run(pool, progress);
  bytes_read_ = plan_.total_bytes();
}

}  // namespace moerun
