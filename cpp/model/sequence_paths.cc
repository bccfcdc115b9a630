#include "model/sequence_paths.h"

#include <algorithm>
#include <utility>

#include "model/routing_paths.h"

namespace moerun {

SequencePaths::SequencePaths(const std::filesystem::path& predictor, const ExpectedModel& expected,
                             std::unique_ptr<Backend> cpu)
    : cpu_(std::move(cpu)), predictor_(PathPredictor::open(predictor, expected, *cpu_)) {}

// What lies further back has no say: every block looks back one window.
std::size_t SequencePaths::reach() const { return shape().window * shape().num_blocks; }

void SequencePaths::add(std::size_t sequence, std::span<const std::int32_t> tokens) {
  if (tokens.size() > reach()) tokens = tokens.subspan(tokens.size() - reach());
  const std::size_t num_outputs = shape().num_outputs();
  sequences_.insert_or_assign(sequence,
                              Sequence{predictor_->make_state(),
                                       {tokens.begin(), tokens.end()},
                                       std::vector<float>(num_outputs),
                                       std::vector<std::uint64_t>(path_words(num_outputs))});
}

void SequencePaths::append(std::size_t sequence, std::int32_t token) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) return;
  Sequence& to = found->second;
  to.new_tokens.push_back(token);
  if (to.new_tokens.size() < 2 * reach()) return;
  // Nobody has asked for long: what the state holds is out of sight, and so are the first of these.
  to.state.clear();
  to.new_tokens.erase(to.new_tokens.begin(), to.new_tokens.end() - static_cast<long>(reach()));
}

std::size_t SequencePaths::predict(std::span<const std::size_t> sequences) {
  std::vector<Sequence*> changed;
  std::vector<PathPredictor::Input> inputs;
  for (const std::size_t number : sequences) {
    Sequence& sequence = sequences_.at(number);
    if (sequence.new_tokens.empty()) continue;
    changed.push_back(&sequence);
    inputs.push_back({&sequence.state, sequence.new_tokens});
  }
  if (inputs.empty()) return 0;
  const std::size_t num_outputs = shape().num_outputs();
  std::vector<float> probabilities(inputs.size() * num_outputs);
  predictor_->predict(inputs, probabilities);
  for (std::size_t i = 0; i < changed.size(); ++i) {
    const auto chances = std::span(probabilities).subspan(i * num_outputs, num_outputs);
    set_likeliest(chances, shape().num_experts, shape().top_k, changed[i]->path);
    changed[i]->chances.assign(chances.begin(), chances.end());
    changed[i]->new_tokens.clear();
  }
  return changed.size();
}

bool SequencePaths::are_predicted(std::span<const std::size_t> sequences) const {
  return std::all_of(sequences.begin(), sequences.end(),
                     [&](std::size_t number) { return sequences_.at(number).new_tokens.empty(); });
}

std::vector<float> SequencePaths::chances_of_any(std::span<const std::size_t> sequences) const {
  std::vector<float> chances;
  for (const std::size_t number : sequences) {
    const std::vector<float>& own = sequences_.at(number).chances;
    if (chances.empty()) chances.assign(own.size(), 1.0F);
    for (std::size_t i = 0; i < own.size(); ++i) chances[i] *= 1.0F - own[i];  // none uses it
  }
  for (float& chance : chances) chance = 1.0F - chance;
  return chances;
}

}  // namespace moerun
