// Sequences of a trace as BatchGeneration would run them: they join in their order, decode together
// and leave when their tokens are used up.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "model/batch_outlook.h"
#include "model/batch_stats.h"
#include "replay/sim_passes.h"

namespace moerun {

class SimBatch {
 public:
  // All must outlive this; `options` with a batch_size. Throws what SequencePaths throws.
  SimBatch(SimPasses& passes, const SimCosts& costs, std::span<const SimSequence> sequences,
           const SimOptions& options, bool is_pool);

  // Times go into `result`.
  BatchStats run(SimResult& result);

 private:
  struct Running {
    std::size_t number = 0;
    std::size_t next = 0;  // its next token
  };

  std::vector<std::size_t> join();
  void run_prompts(std::span<const std::size_t> joined, SimResult& result);
  void begin(std::size_t number);
  void run_step(SimResult& result);
  std::vector<Running*> next_batch();

  SimPasses& passes_;
  double predict_s_;
  std::span<const SimSequence> sequences_;
  const SimOptions& options_;
  std::unique_ptr<BatchOutlook> outlook_;  // null: nothing is predicted
  std::size_t num_joined_ = 0;
  std::vector<Running> running_;
  double predicted_at_ = 0;  // when what is predicted beside the step is done
  BatchStats stats_;
};

}  // namespace moerun
