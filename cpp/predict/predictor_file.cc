#include "predict/predictor_file.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "io/json_text.h"
#include "io/quote.h"
#include "io/safetensors.h"

namespace moerun {
namespace {

constexpr std::string_view kFormat = "moerun-predictor";
constexpr std::string_view kVersion = "1";
constexpr float kNormEps = 1e-5f;
// Far above what any predictor needs; below what could make one allocate absurdly much.
constexpr std::size_t kMaxWidth = 8192;
constexpr std::size_t kMaxBlocks = 32;
constexpr std::size_t kMaxWindow = 4096;
constexpr std::size_t kMaxVocabulary = std::size_t{1} << 24;
constexpr std::size_t kMaxLayers = 1024;
constexpr std::size_t kMaxLayerNumber = std::size_t{1} << 20;
constexpr std::size_t kMaxExperts = 65535;
constexpr std::size_t kMaxOutputs = std::size_t{1} << 20;
constexpr std::string_view kTrainAgain =
    "; train a predictor for this model with moe-predictor train";

class Metadata {
 public:
  Metadata(const std::map<std::string, std::string>& fields, std::string where)
      : fields_(fields), where_(std::move(where)) {}

  std::string text(const std::string& key) const {
    const auto found = fields_.find(key);
    return found == fields_.end() ? std::string() : found->second;
  }

  // Of decimal digits, in [least, most], and a multiple of `unit`.
  std::size_t number(const std::string& key, std::size_t least, std::size_t most,
                     std::size_t unit = 1) const {
    const std::string found = text(key);
    const bool is_number =
        !found.empty() && found.size() <= 9 &&
        std::all_of(found.begin(), found.end(), [](char c) { return c >= '0' && c <= '9'; });
    const std::size_t value = is_number ? std::stoul(found) : 0;
    if (!is_number || value < least || value > most || value % unit != 0) {
      wrong(key, message("a number from ", least, " to ", most,
                         unit == 1 ? "" : message(", a multiple of ", unit)));
    }
    return value;
  }

  std::vector<std::size_t> layers(const std::string& key) const {
    const std::string wanted = message("a JSON list of at most ", kMaxLayers, " rising numbers");
    const std::string found = text(key);
    if (found.size() > 16 * kMaxLayers) wrong(key, wanted);
    const auto list = nlohmann::json::parse(found, nullptr, /*allow_exceptions=*/false);
    std::vector<std::size_t> numbers;
    if (!list.is_array() || list.empty() || list.size() > kMaxLayers) wrong(key, wanted);
    for (const auto& entry : list) {
      if (!entry.is_number_unsigned()) wrong(key, wanted);
      const auto number = entry.get<std::uint64_t>();
      if (number > kMaxLayerNumber || (!numbers.empty() && number <= numbers.back())) {
        wrong(key, wanted);
      }
      numbers.push_back(number);
    }
    return numbers;
  }

  // Lower-case hexadecimal digits.
  std::string hash(const std::string& key, std::size_t digits) const {
    const std::string found = text(key);
    const bool fits = found.size() == digits && std::all_of(found.begin(), found.end(), [](char c) {
                        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
                      });
    if (!fits) wrong(key, message(digits, " hexadecimal digits"));
    return found;
  }

  [[noreturn]] void wrong(const std::string& key, const std::string& expected) const {
    const auto found = fields_.find(key);
    throw FormatError(message(where_, ": metadata ", key, ": expected ", expected, ", found ",
                              found == fields_.end() ? "none" : quote(found->second, 60)));
  }

 private:
  const std::map<std::string, std::string>& fields_;
  std::string where_;
};

PredictorShape read_shape(const Metadata& metadata) {
  if (metadata.text("format") != kFormat) {
    metadata.wrong("format", message(quote(kFormat), ", which moe-predictor train writes"));
  }
  if (metadata.text("version") != kVersion) {
    metadata.wrong("version", message(quote(kVersion), " (a newer moerun may read others)"));
  }
  PredictorShape shape;
  shape.vocab_size = metadata.number("vocab_size", 1, kMaxVocabulary);
  shape.moe_layers = metadata.layers("moe_layers");
  shape.num_experts = metadata.number("num_experts", 1, kMaxExperts);
  shape.top_k = metadata.number("top_k", 1, shape.num_experts);
  shape.embedding_size = metadata.number("embedding_size", kRowQuantum, kMaxWidth, kRowQuantum);
  shape.hidden_size = metadata.number("hidden_size", kRowQuantum, kMaxWidth, kRowQuantum);
  shape.mlp_size = metadata.number("mlp_size", kRowQuantum, 4 * kMaxWidth, kRowQuantum);
  shape.num_blocks = metadata.number("num_blocks", 1, kMaxBlocks);
  shape.num_heads = metadata.number("num_heads", 1, shape.hidden_size / 8);
  if (shape.hidden_size % (8 * shape.num_heads) != 0) {
    metadata.wrong("num_heads", message("a divisor of hidden_size (", shape.hidden_size,
                                        ") that leaves heads of a multiple of 8"));
  }
  shape.window = metadata.number("window", 1, kMaxWindow);
  if (shape.num_outputs() > kMaxOutputs) {
    metadata.wrong("num_experts", message("at most ", kMaxOutputs, " outputs in ",
                                          shape.moe_layers.size(), " layers"));
  }
  return shape;
}

std::string list_text(const std::vector<std::size_t>& numbers) {
  std::vector<std::uint64_t> wide(numbers.begin(), numbers.end());
  return shape_text(wide);
}

void check_model(const PredictorFile& file, const ExpectedModel& expected,
                 const std::string& where) {
  std::string differences;
  const auto compare = [&](const char* name, const auto& found, const auto& wanted, bool is_known) {
    if (!is_known || found == wanted) return;
    differences +=
        message(differences.empty() ? "" : "; ", name, " is ", found, ", expected ", wanted);
  };
  const PredictorShape& shape = file.shape;
  compare("model_id", file.model_id, expected.model_id, !expected.model_id.empty());
  compare("tokenizer_hash", file.tokenizer_hash, expected.tokenizer_hash,
          !expected.tokenizer_hash.empty());
  compare("vocab_size", shape.vocab_size, expected.vocab_size, expected.vocab_size != 0);
  compare("moe_layers", list_text(shape.moe_layers), list_text(expected.moe_layers),
          !expected.moe_layers.empty());
  compare("num_experts", shape.num_experts, expected.num_experts, expected.num_experts != 0);
  compare("top_k", shape.top_k, expected.top_k, expected.top_k != 0);
  if (differences.empty()) return;
  throw FormatError(message(where, ": the predictor is of another model (", quote(file.model, 60),
                            "): its ", differences, kTrainAgain));
}

// Finds the tensors, and copies them one after the other to one block of memory.
class TensorReader {
 public:
  TensorReader(const SafetensorsFile& file) : file_(file), where_(file.path().string()) {}

  MatrixView matrix(const std::string& name, std::size_t rows, std::size_t cols) {
    place(name, DType::bf16, {rows, cols});
    return {nullptr, DType::bf16, rows, cols, cols};
  }
  void vector(const std::string& name, std::size_t size) { place(name, DType::f32, {size}); }

  std::size_t bytes() const { return bytes_; }
  std::size_t num_tensors() const { return places_.size(); }

  // Reads everything; the tensors lie in the order in which they were asked for.
  void read_to(std::byte* memory) {
    for (const Place& each : places_) {
      file_.read_at(each.info->offset, {memory + each.offset, each.info->bytes});
      check_finite(each, memory + each.offset);
    }
    next_ = 0;
    memory_ = memory;
  }
  // After read_to(): the next one in that order.
  const std::byte* take() { return memory_ + places_[next_++].offset; }

 private:
  struct Place {
    const TensorInfo* info;
    std::size_t offset;
  };

  void place(const std::string& name, DType dtype, std::vector<std::uint64_t> shape) {
    const TensorInfo* info = file_.find(name);
    const std::string at = message(where_, ": tensor ", quote(name), ": ");
    if (info == nullptr) {
      throw FormatError(message(at, "it is missing, expected ", name_of(dtype), " of shape ",
                                shape_text(shape), kDamaged));
    }
    if (info->dtype != std::optional(dtype)) {
      throw FormatError(
          message(at, "found ", info->dtype_name, ", expected ", name_of(dtype), kDamaged));
    }
    if (info->shape != shape) {
      throw FormatError(message(at, "found shape ", shape_text(info->shape), ", expected ",
                                shape_text(shape), " by the metadata", kDamaged));
    }
    places_.push_back({info, bytes_});
    bytes_ += (static_cast<std::size_t>(info->bytes) + kAlignment - 1) / kAlignment * kAlignment;
  }

  void check_finite(const Place& each, const std::byte* data) const {
    const std::size_t size = each.info->bytes / size_of(*each.info->dtype);
    const bool is_half = *each.info->dtype == DType::bf16;
    for (std::size_t i = 0; i < size; ++i) {
      const bool is_finite =
          is_half ? (reinterpret_cast<const std::uint16_t*>(data)[i] & 0x7f80u) != 0x7f80u
                  : std::isfinite(reinterpret_cast<const float*>(data)[i]);
      if (is_finite) continue;
      throw FormatError(message(where_, ": tensor ", quote(each.info->name), ": entry ", i,
                                " is not a finite number", kDamaged));
    }
  }

  static constexpr std::size_t kAlignment = 64;
  static constexpr const char* kDamaged = "; the file is damaged: copy or train it again";

  const SafetensorsFile& file_;
  std::string where_;
  std::vector<Place> places_;
  std::size_t bytes_ = 0;
  std::size_t next_ = 0;
  const std::byte* memory_ = nullptr;
};

PredictorWeights read_weights(const SafetensorsFile& file, const PredictorShape& shape,
                              Backend& cpu) {
  TensorReader reader(file);
  PredictorWeights weights;
  const std::size_t hidden = shape.hidden_size;
  // Twice the same walk: first to check and place all tensors, then to take their addresses.
  weights.embedding = reader.matrix("embedding.weight", shape.vocab_size, shape.embedding_size);
  weights.embedding_projection =
      reader.matrix("embedding_projection.weight", hidden, shape.embedding_size);
  for (std::size_t b = 0; b < shape.num_blocks; ++b) {
    const std::string at = message("blocks.", b, ".");
    PredictorBlock block;
    reader.vector(at + "attention_norm.weight", hidden);
    block.qkv = reader.matrix(at + "qkv.weight", 3 * hidden, hidden);
    block.attention_output = reader.matrix(at + "attention_output.weight", hidden, hidden);
    reader.vector(at + "mlp_norm.weight", hidden);
    block.mlp_up = reader.matrix(at + "mlp_up.weight", shape.mlp_size, hidden);
    block.mlp_down = reader.matrix(at + "mlp_down.weight", hidden, shape.mlp_size);
    weights.blocks.push_back(block);
  }
  reader.vector("final_norm.weight", hidden);
  weights.head.weight = reader.matrix("head.weight", shape.num_outputs(), hidden);
  reader.vector("head.bias", shape.num_outputs());

  // For people and tools in Python: hashes of the sequences that it was trained on.
  const TensorInfo* trained = file.find("trained_sequences");
  const bool has_trained =
      trained != nullptr && trained->dtype_name == "I64" && trained->shape.size() == 1;
  if (!has_trained || file.tensors().size() != reader.num_tensors() + 1) {
    throw FormatError(message(file.path().string(), ": expected ", reader.num_tensors(),
                              " tensors of weights and I64 'trained_sequences', found ",
                              file.tensors().size(), " tensors", has_trained ? "" : " without it",
                              "; the file is damaged: copy or train it again"));
  }
  weights.memory = cpu.allocate(reader.bytes(), "the routing-path predictor", MemoryUse::streamed);
  reader.read_to(weights.memory->data());

  const auto take_norm = [&] {
    return NormWeights{NormKind::rms, reinterpret_cast<const float*>(reader.take()), nullptr,
                       kNormEps};
  };
  weights.embedding.data = reader.take();
  weights.embedding_projection.data = reader.take();
  for (PredictorBlock& block : weights.blocks) {
    block.attention_norm = take_norm();
    block.qkv.data = reader.take();
    block.attention_output.data = reader.take();
    block.mlp_norm = take_norm();
    block.mlp_up.data = reader.take();
    block.mlp_down.data = reader.take();
  }
  weights.final_norm = take_norm();
  weights.head.weight.data = reader.take();
  weights.head.bias = reinterpret_cast<const float*>(reader.take());
  return weights;
}

}  // namespace

PredictorFile read_predictor(const std::filesystem::path& path, const ExpectedModel& expected,
                             Backend& cpu) {
  const SafetensorsFile opened = SafetensorsFile::open(path);
  const std::string where = path.string();
  const Metadata metadata(opened.metadata(), where);
  PredictorFile file;
  file.path = where;
  file.shape = read_shape(metadata);
  file.model = metadata.text("model");
  file.model_id = metadata.hash("model_id", 16);
  file.tokenizer_hash = metadata.hash("tokenizer_hash", 64);
  check_model(file, expected, where);
  file.weights = read_weights(opened, file.shape, cpu);
  return file;
}

}  // namespace moerun
