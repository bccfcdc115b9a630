// An expert cache over experts whose bytes say where they belong, driven without a model.
#pragma once

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert/expert_cache.h"
#include "model/model.h"
#include "small_model.h"

namespace moerun::test {

inline std::uint64_t pattern_of(ExpertId id, std::size_t record) {
  return (id.layer * 1000 + id.expert) * 1'000'003 + record * 7919 + 1;
}

class PatternExperts : public ExpertStore {
 public:
  explicit PatternExperts(const ModelWeights& weights) : weights_(weights) {}

  std::size_t num_pieces(const SegmentRead& read) const override { return read.runs.size(); }
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch&) const override {
    if (reads_until_failure >= 0 && reads_until_failure-- <= 0) {
      reads_until_failure = 0;  // and goes on failing
      throw FileError("injected: the disk has a bad day");
    }
    if (delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    const std::size_t record_bytes = weights_.layers[read.id.layer].record_bytes();
    const RecordRun& run = read.runs[piece];
    for (std::size_t i = 0; i < run.num_records; ++i) {
      const std::uint64_t pattern = pattern_of(read.id, run.first_record + i);
      for (std::size_t at = 0; at < record_bytes; at += sizeof(pattern)) {
        std::memcpy(run.data + i * record_bytes + at, &pattern, sizeof(pattern));
      }
    }
    return run.num_records * record_bytes;
  }
  bool is_direct() const override { return true; }

  mutable std::atomic<int> reads_until_failure{-1};  // -1: never
  std::atomic<int> delay_us{0};                      // of every piece

 private:
  const ModelWeights& weights_;
};

// Layers 1 and 2 of three have experts, 10 of 72 records each.
class PatternCache {
 public:
  explicit PatternCache(const std::string& plan_text, const ModelOptions& options = {})
      : PatternCache(options, planned(options.experts, plan_text)) {}
  // Any policy and budget.
  explicit PatternCache(const ExpertCacheOptions& experts) : PatternCache({}, experts) {}

  CacheLayout layout(const std::string& plan_text, const std::string& policy = "") const {
    ExpertCacheOptions options = planned({}, plan_text);
    options.policy = policy;
    return make_cache_layout(*plan_.weights, kTopK, options, 0);
  }

  // Asks a layer for experts, and checks every byte of them. `after_asking` runs when the lease is
  // there and nothing has been taken from it.
  void use(std::size_t layer, const std::vector<std::size_t>& experts, AccessMode mode,
           const std::function<void()>& after_asking = {}) {
    const auto lease = cache_.acquire(layer, experts, mode);
    if (after_asking) after_asking();
    std::vector<std::size_t> seen(10, 0);
    std::vector<Segment> segments;
    const std::size_t record_bytes = plan_.weights->layers[layer].record_bytes();
    int waits = 0;
    const auto while_waiting = [&] {  // every tenth of a second
      if (++waits > 100) fail(__FILE__, __LINE__, "nothing has come for ten seconds");
    };
    while (lease->next(segments, while_waiting)) {
      for (const Segment& segment : segments) {
        CHECK_EQ(segment.first_record, seen[segment.expert]);
        seen[segment.expert] += segment.num_records;
        for (std::size_t i = 0; i < segment.records.size(); i += sizeof(std::uint64_t)) {
          std::uint64_t found = 0;
          std::memcpy(&found, segment.records.data() + i, sizeof(found));
          CHECK_EQ(found,
                   pattern_of({layer, segment.expert}, segment.first_record + i / record_bytes));
        }
      }
    }
    for (const std::size_t expert : experts) CHECK_EQ(seen[expert], std::size_t{72});
  }

  // Before every one that a step or a call before may have left unfinished.
  void begin_pass() { cache_.begin_pass(*stream_); }

  void decode(const std::vector<std::vector<std::size_t>>& experts) {
    cache_.begin_step(1);
    for (std::size_t i = 0; i < kLayers.size(); ++i) {
      use(kLayers[i], experts[i], AccessMode::decode);
    }
    cache_.finish_step(0.001);
  }

  // What is resident has the right bytes; changes nothing.
  void check_residents() {
    const auto residents = cache_.residents();
    const CacheLayout layout = cache_.layout();
    for (std::size_t i = 0; i < kLayers.size(); ++i) {
      CHECK(residents[i].size() <= layout.layers[i].num_slots);
      for (const std::size_t expert : residents[i]) {
        const std::vector<std::size_t> one = {expert};
        use(kLayers[i], one, AccessMode::prefill);
      }
    }
    CHECK(cache_.residents() == residents);
  }

  ExpertCache& cache() { return cache_; }
  PatternExperts& store() { return store_; }
  const ModelWeights& weights() const { return *plan_.weights; }

  static constexpr std::size_t kTopK = 3;
  static inline const std::vector<std::size_t> kLayers = {1, 2};

 private:
  PatternCache(const ModelOptions& options, const ExpertCacheOptions& experts)
      : plan_(plan_model(write_small_model(folder_, {}), options)),
        store_(*plan_.weights),
        stream_(plan_.backend->make_stream()),
        cache_(*plan_.weights, make_cache_layout(*plan_.weights, kTopK, experts, 0), &store_,
               nullptr, experts, nullptr, *plan_.backend) {
    begin_pass();
  }
  static ExpertCacheOptions planned(ExpertCacheOptions options, const std::string& plan_text) {
    options.plan = "plan";
    options.plan_text = plan_text;
    return options;
  }

  TempFolder folder_;
  ModelPlan plan_;
  PatternExperts store_;
  std::unique_ptr<Stream> stream_;
  ExpertCache cache_;
};

struct PlanLayer {
  std::size_t slots = 0;
  double split = 1;
  std::string more = {};  // fields, with a comma before
};

inline std::string plan_text(const std::vector<PlanLayer>& layers,
                             const std::string& policy = "lcp",
                             std::size_t budget_bytes = 1'000'000'000) {
  std::string text = message(R"({"version": 1, "budget_bytes": )", budget_bytes, R"(, "policy": ")",
                             policy, R"(", "layers": [)");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    text += message(i == 0 ? "" : ", ", R"({"layer": )", i + 1, R"(, "slots": )", layers[i].slots,
                    R"(, "split": )", layers[i].split, layers[i].more, "}");
  }
  return text + "]}";
}

// Experts of a token in each layer: mostly few of them, as in real models.
inline std::vector<std::vector<std::size_t>> random_token(std::mt19937& random) {
  std::vector<std::vector<std::size_t>> token(PatternCache::kLayers.size());
  for (auto& experts : token) {
    while (experts.size() < PatternCache::kTopK) {
      const std::size_t expert = random() % (random() % 3 == 0 ? 10 : 5);
      if (std::find(experts.begin(), experts.end(), expert) == experts.end()) {
        experts.push_back(expert);
      }
    }
  }
  return token;
}

}  // namespace moerun::test
