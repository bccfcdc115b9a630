// What the last tokens asked of the cache: bounded, and exact enough to say what any other cache
// would have done with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace moerun {

// A copy of the window, one entry for each layer with experts.
struct RoutingHistory {
  // An expert that came into a slot without a miss of decoding, before this token of the window: a
  // prompt or a warm start put it there.
  struct Offer {
    std::uint32_t token = 0;
    std::uint16_t expert = 0;
  };
  struct Layer {
    std::vector<std::uint16_t> expert_ids;  // (tokens, top_k) in the router's order; see kNoExpert
    std::uint64_t hits = 0;                 // of the live cache: all records, or the top ones
    std::vector<std::uint16_t> start;       // in slots before the first token
    std::vector<Offer> offers;              // by rising token
    // Of guesses for these tokens, by rank: how often there was one, and it was used. (top_k)
    std::vector<std::uint64_t> named;
    std::vector<std::uint64_t> right;
  };
  std::size_t num_tokens = 0;
  std::size_t top_k = 0;
  std::vector<Layer> layers;
};

// Two blocks: the one that is being filled, and the full one before it. Not thread-safe.
class RoutingWindow {
 public:
  // Experts in the slots of a layer at this moment.
  using Residents = std::function<std::vector<std::uint16_t>(std::size_t layer_index)>;
  static constexpr std::size_t kMaxBlockTokens = 4096;
  static constexpr std::size_t kMaxBytes = std::size_t{8} << 20;  // of both blocks' ids

  RoutingWindow(std::size_t num_layers, std::size_t top_k);

  std::size_t block_tokens() const { return block_tokens_; }

  void begin_token(const Residents& residents);
  // A layer was asked for these experts, in the router's order; so many were in slots.
  void record(std::size_t layer_index, std::span<const std::size_t> experts, std::size_t num_hits);
  // A token that did not ask every layer once leaves no trace but in the slots.
  void finish_token();

  // An expert came into a slot that decoding had not missed.
  void offer(std::size_t layer_index, std::size_t expert);
  // What the layer's next token will use, the likeliest first.
  void guess(std::size_t layer_index, std::span<const std::size_t> experts);
  void forget_guess(std::size_t layer_index) { guesses_[layer_index].clear(); }

  // Begins anew: what was known says nothing about other slots.
  void restart();

  // Differs where what copy() has may differ.
  std::uint64_t version() const { return version_; }
  RoutingHistory copy() const;

 private:
  struct BlockLayer {
    std::vector<std::uint16_t> ids;
    std::uint64_t hits = 0;
    std::vector<std::uint16_t> start;
    std::vector<RoutingHistory::Offer> offers;
    std::vector<std::uint64_t> named;
    std::vector<std::uint64_t> right;
  };
  struct Block {
    std::size_t num_tokens = 0;
    std::vector<BlockLayer> layers;
  };
  struct Lookup {
    std::vector<std::uint16_t> ids;  // (top_k); empty: not asked yet
    std::size_t hits = 0;
  };

  void offer_residents(const Residents& residents);
  void begin_block(const Residents& residents);
  void judge_guess(std::size_t layer_index, std::span<const std::size_t> experts);

  std::size_t top_k_;
  std::size_t block_tokens_;
  std::optional<Block> previous_;
  std::optional<Block> current_;
  std::vector<Lookup> token_;  // (layers)
  std::vector<std::vector<std::size_t>> guesses_;
  bool is_within_token_ = false;
  bool is_torn_ = false;  // slots have changed in a token that is not in the window
  std::size_t num_offers_ = 0;
  std::uint64_t version_ = 0;
};

}  // namespace moerun
