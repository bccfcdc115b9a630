// Passes through the layers on virtual time: the cache's calls in the order in which Decoder makes
// them, and what computing takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/clock.h"
#include "expert/active_experts.h"
#include "expert/expert_cache.h"
#include "replay/sim_backend.h"
#include "replay/sim_engine.h"
#include "replay/simulator.h"

namespace moerun {

// The next tokens of one sequence.
struct SimRows {
  const SimSequence* sequence = nullptr;
  std::size_t first = 0;
  std::size_t count = 1;
};

class SimPasses {
 public:
  // Decoding, each sequence has one token. The first use of a weight takes what it does for a token
  // that is decoded alone, any further one what it does in a prompt.
  enum class Kind { decode, prompt };

  // All but `layout` must outlive this.
  SimPasses(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
            const PieceSizes& sizes, const SimCosts& costs, std::span<const SimSequence> sequences,
            const SimOptions& options);

  // `forecasts`: as ExpertCache::begin_step.
  void run(std::span<const SimRows> rows, Kind kind, ForecastSource* forecasts = nullptr);
  // After a pass, the next tokens of so many sequences.
  void compute_head(std::size_t num_tokens);

  ExpertCache* cache() { return cache_.get(); }  // null: every expert is resident
  VirtualClock& clock() { return clock_; }
  // Different experts of the last pass, of each layer with experts.
  std::span<const std::size_t> num_active() const { return num_active_; }
  // What the cache has counted, and the time of everything.
  void report(SimResult& result) const;

 private:
  // What computing takes in one layer with experts: the first use of a weight, and any further one.
  struct LayerCost {
    double first_attention_s = 0;  // a token
    double attention_s = 0;
    double first_byte_s = 0;  // of records
    double byte_s = 0;

    double of_attention(std::size_t tokens) const {
      return first_attention_s + static_cast<double>(tokens - 1) * attention_s;
    }
    double of_bytes(std::size_t bytes, std::size_t uses) const {
      return static_cast<double>(bytes) * (first_byte_s + static_cast<double>(uses - 1) * byte_s);
    }
  };

  void make_cache(CacheLayout layout, const PieceSizes& sizes);
  std::unique_ptr<CachePolicy> make_belady(std::size_t layer) const;
  LayerCost cost_of(std::size_t index, Kind kind) const;
  const LayerWeights& layer_at(std::size_t index) const { return weights_.layers[layers_[index]]; }
  std::size_t shared_bytes(const LayerWeights& layer) const;
  void run_layer(std::span<const SimRows> rows, Kind kind, std::size_t index);
  void compute_cached(std::span<const SimRows> rows, Kind kind, std::size_t index,
                      const ActiveExperts& active);
  // What the layer's router named for these tokens, or for those after them.
  void prefetch(std::span<const SimRows> rows, std::size_t ahead, std::size_t index);
  void compute(double seconds);
  std::span<const std::uint16_t> ids_of(std::span<const std::uint16_t> ids,
                                        const SimSequence& sequence, std::size_t index,
                                        std::size_t token) const {
    return ids.subspan((index * sequence.num_tokens + token) * top_k_, top_k_);
  }

  const ModelWeights& weights_;
  std::size_t top_k_;
  const SimCosts& costs_;
  std::span<const SimSequence> sequences_;
  const SimOptions& options_;
  std::vector<std::size_t> layers_;  // those with experts
  VirtualClock clock_;
  SimBackend backend_;
  std::unique_ptr<Stream> stream_;
  SimEngine* engine_ = nullptr;  // the cache's own
  std::unique_ptr<ExpertCache> cache_;
  std::vector<std::size_t> num_active_;
  double further_head_ = 0;       // share of head_s of any token but the first
  std::uint64_t warm_bytes_ = 0;  // moved before the first token
  double warm_s_ = 0;             // when it began
};

}  // namespace moerun
