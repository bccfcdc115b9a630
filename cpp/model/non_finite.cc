#include "model/non_finite.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/quote.h"
#include "weights/tensor_contents.h"
#include "weights/tensor_names.h"

namespace moerun {
namespace {

using Part = NonFinitePlace::Part;

std::string value_text(float value) {
  return std::isnan(value) ? "NaN" : value > 0 ? "infinity" : "minus infinity";
}

class Search {
 public:
  Search(const ModelConfig& config, const ModelWeights& weights)
      : weights_(weights), checkpoint_(weights.checkpoint()), names_(config, checkpoint_) {}

  // Each throws where it finds something; `place` says where the numbers were met.
  void embedding_rows(std::span<const std::int32_t> token_ids, const std::string& place) const {
    const std::string name = embedding_name();
    const auto cols = static_cast<std::uint64_t>(weights_.embedding.cols);
    std::vector<std::int32_t> rows(token_ids.begin(), token_ids.end());
    std::ranges::sort(rows);
    const auto behind = std::ranges::unique(rows).begin();
    for (auto row = rows.begin(); row != behind; ++row) {
      const TensorRef* tensor = checkpoint_.find(name);
      const auto found = find_non_finite(*tensor, static_cast<std::uint64_t>(*row) * cols, cols);
      if (found) refuse(*tensor, *found, place + message(", of token ", *row));
    }
  }

  void layer(std::size_t index, const std::string& place) const {
    all_of("model.layers." + std::to_string(index) + ".", place);
  }

  void head(const std::string& place) const {
    all_of(names_.final_norm() + ".", place);
    all_of(names_.lm_head() + ".", place);
    all_of(embedding_name(), place);
  }

  const Checkpoint& checkpoint() const { return checkpoint_; }

 private:
  std::string embedding_name() const {
    const std::string name = names_.embedding();
    return checkpoint_.find(name) != nullptr ? name : names_.lm_head() + ".weight";
  }

  // The small tensors first: they are read at once, and decide most.
  void all_of(const std::string& prefix, const std::string& place) const {
    std::vector<const TensorRef*> tensors;
    for (const std::string& name : checkpoint_.names()) {
      if (name.starts_with(prefix)) tensors.push_back(checkpoint_.find(name));
    }
    std::ranges::stable_sort(tensors, {}, [](const TensorRef* each) { return each->info->bytes; });
    for (const TensorRef* tensor : tensors) {
      if (const auto found = find_non_finite(*tensor)) refuse(*tensor, *found, place);
    }
  }

  [[noreturn]] static void refuse(const TensorRef& tensor, const NonFinite& found,
                                  const std::string& place) {
    throw FormatError(message(tensor.file->path().string(), ": tensor ", quote(tensor.info->name),
                              ": found ", value_text(found.value), " at element ", found.element,
                              ", expected numbers, which ", place,
                              " needs; the weights are damaged: download the file again"));
  }

  const ModelWeights& weights_;
  const Checkpoint& checkpoint_;
  TensorNames names_;
};

std::string text_of(const NonFinitePlace& place) {
  switch (place.part) {
    case Part::embedding:
      return "the embedding";
    case Part::layer:
    case Part::up_to_layer:
      return message("layer ", place.layer);
    case Part::head:
    case Part::anywhere:
      return "the head";
  }
  return "";
}

}  // namespace

void refuse_non_finite(const ModelConfig& config, const ModelWeights& weights,
                       std::span<const std::int32_t> token_ids, const NonFinitePlace& place) {
  const Search search(config, weights);
  const auto layer = [&](std::size_t index) { search.layer(index, message("layer ", index)); };
  switch (place.part) {
    case Part::embedding:
      search.embedding_rows(token_ids, text_of(place));
      break;
    case Part::layer:
      layer(place.layer);
      break;
    case Part::up_to_layer:
    case Part::anywhere: {
      const bool is_anywhere = place.part == Part::anywhere;
      search.embedding_rows(token_ids, "the embedding");
      const std::size_t end = is_anywhere ? weights.layers.size() : place.layer + 1;
      for (std::size_t index = 0; index < end; ++index) layer(index);
      if (is_anywhere) search.head(text_of(place));
      break;
    }
    case Part::head:
      search.head(text_of(place));
      break;
  }
  throw FormatError(message(search.checkpoint().directory().string(), ": ", text_of(place),
                            " computed NaN or infinity, though all of its weights are numbers: "
                            "the activations became too large for float32; do config.json and "
                            "weights belong together?"));
}

}  // namespace moerun
