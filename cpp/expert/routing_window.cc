#include "expert/routing_window.h"

#include <algorithm>
#include <utility>

#include "trace/routing_record.h"

namespace moerun {
namespace {

// Tokens that are interrupted again and again offer all residents each time.
constexpr std::size_t kMaxOffers = 65536;

}  // namespace

RoutingWindow::RoutingWindow(std::size_t num_layers, std::size_t top_k)
    : top_k_(top_k), token_(num_layers), guesses_(num_layers) {
  const std::size_t token_bytes =
      std::max<std::size_t>(num_layers * top_k * sizeof(std::uint16_t), 1);
  block_tokens_ = std::clamp<std::size_t>(kMaxBytes / 2 / token_bytes, 1, kMaxBlockTokens);
}

void RoutingWindow::begin_block(const Residents& residents) {
  previous_ = std::exchange(current_, Block{});
  num_offers_ = 0;
  if (previous_) {
    for (const BlockLayer& layer : previous_->layers) num_offers_ += layer.offers.size();
  }
  current_->layers.resize(token_.size());
  for (std::size_t i = 0; i < token_.size(); ++i) {
    BlockLayer& layer = current_->layers[i];
    layer.start = residents(i);
    layer.named.assign(top_k_, 0);
    layer.right.assign(top_k_, 0);
  }
}

// Replaces what was offered since the last token: all of that is in it.
void RoutingWindow::offer_residents(const Residents& residents) {
  const auto token = static_cast<std::uint32_t>(current_->num_tokens);
  for (std::size_t i = 0; i < token_.size(); ++i) {
    auto& offers = current_->layers[i].offers;
    num_offers_ -= std::erase_if(offers, [&](const auto& each) { return each.token == token; });
    for (const std::uint16_t expert : residents(i)) {
      offers.push_back({token, expert});
      ++num_offers_;
    }
  }
}

void RoutingWindow::begin_token(const Residents& residents) {
  if (is_within_token_) is_torn_ = true;
  if (num_offers_ > kMaxOffers) restart();
  if (current_ && is_torn_) offer_residents(residents);
  is_torn_ = false;
  if (!current_ || current_->num_tokens == block_tokens_) begin_block(residents);
  for (Lookup& lookup : token_) lookup.ids.clear();
  is_within_token_ = true;
}

void RoutingWindow::record(std::size_t layer_index, std::span<const std::size_t> experts,
                           std::size_t num_hits) {
  Lookup& lookup = token_[layer_index];
  if (!is_within_token_ || !lookup.ids.empty() || experts.empty() || experts.size() > top_k_) {
    is_torn_ = true;
    return;
  }
  judge_guess(layer_index, experts);
  lookup.ids.assign(top_k_, kNoExpert);
  std::transform(experts.begin(), experts.end(), lookup.ids.begin(),
                 [](std::size_t expert) { return static_cast<std::uint16_t>(expert); });
  lookup.hits = num_hits;
}

void RoutingWindow::judge_guess(std::size_t layer_index, std::span<const std::size_t> experts) {
  BlockLayer& layer = current_->layers[layer_index];
  const auto& guess = guesses_[layer_index];
  for (std::size_t rank = 0; rank < std::min(guess.size(), top_k_); ++rank) {
    ++layer.named[rank];
    if (std::find(experts.begin(), experts.end(), guess[rank]) != experts.end()) {
      ++layer.right[rank];
    }
  }
  forget_guess(layer_index);
}

void RoutingWindow::finish_token() {
  const bool is_whole = is_within_token_ && !is_torn_ &&
                        std::none_of(token_.begin(), token_.end(),
                                     [](const Lookup& lookup) { return lookup.ids.empty(); });
  is_within_token_ = false;
  is_torn_ = !is_whole;
  if (!is_whole) return;
  for (std::size_t i = 0; i < token_.size(); ++i) {
    BlockLayer& layer = current_->layers[i];
    if (layer.ids.size() + top_k_ > layer.ids.capacity()) {  // twice as much, but never too much
      layer.ids.reserve(
          std::min(std::max(2 * layer.ids.capacity(), 64 * top_k_), block_tokens_ * top_k_));
    }
    layer.ids.insert(layer.ids.end(), token_[i].ids.begin(), token_[i].ids.end());
    layer.hits += token_[i].hits;
  }
  ++current_->num_tokens;
  ++version_;
}

void RoutingWindow::offer(std::size_t layer_index, std::size_t expert) {
  if (!current_) return;  // the first block will find it in its slot
  current_->layers[layer_index].offers.push_back(
      {static_cast<std::uint32_t>(current_->num_tokens), static_cast<std::uint16_t>(expert)});
  ++num_offers_;
}

void RoutingWindow::guess(std::size_t layer_index, std::span<const std::size_t> experts) {
  guesses_[layer_index].assign(experts.begin(), experts.end());
}

void RoutingWindow::restart() {
  previous_.reset();
  current_.reset();
  is_within_token_ = false;
  is_torn_ = false;
  num_offers_ = 0;
  for (auto& guess : guesses_) guess.clear();
  ++version_;
}

RoutingHistory RoutingWindow::copy() const {
  RoutingHistory history;
  history.top_k = top_k_;
  history.layers.resize(token_.size());
  for (auto& layer : history.layers) {
    layer.named.assign(top_k_, 0);
    layer.right.assign(top_k_, 0);
  }
  bool is_first = true;
  for (const auto* block : {&previous_, &current_}) {
    if (!*block) continue;
    for (std::size_t i = 0; i < token_.size(); ++i) {
      const BlockLayer& from = (*block)->layers[i];
      RoutingHistory::Layer& to = history.layers[i];
      if (is_first) to.start = from.start;  // those of the second follow from the first
      to.expert_ids.insert(to.expert_ids.end(), from.ids.begin(), from.ids.end());
      to.hits += from.hits;
      for (RoutingHistory::Offer offer : from.offers) {
        offer.token += static_cast<std::uint32_t>(history.num_tokens);
        to.offers.push_back(offer);
      }
      for (std::size_t rank = 0; rank < top_k_; ++rank) {
        to.named[rank] += from.named[rank];
        to.right[rank] += from.right[rank];
      }
    }
    history.num_tokens += (*block)->num_tokens;
    is_first = false;
  }
  return history;
}

}  // namespace moerun
