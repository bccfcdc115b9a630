// Experts in page-locked memory, in pageable memory and on disk behind a device: the same bits.
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "host/device.h"
#include "host/host_backend.h"
#include "model/dry_run.h"
#include "model/generation.h"
#include "model/stats.h"
#include "temp_folder.h"

namespace moerun::test {
namespace {

const std::string kModel = MOERUN_TEST_MODEL;
constexpr std::size_t kExperts = 8 * 32;  // of that model

ModelOptions with(const std::string& pin_limit, const std::string& tier,
                  const std::string& budget = "25%") {
  ModelOptions options;
  options.context_length = 64;
  options.threads = 1;
  options.make_backend = cuda_host::make_backend;
  options.experts.budget = budget;
  options.experts.pin_limit = pin_limit;
  options.experts.host_tier = tier;
  options.experts.reader_threads = 2;
  return options;
}

struct Text {
  std::vector<std::int32_t> ids;
  std::uint64_t hash = 0;  // of the last logits
  bool operator==(const Text&) const = default;
};

Text generate(const std::shared_ptr<Model>& model, std::size_t count = 4) {
  std::vector<std::int32_t> prompt;
  for (std::int32_t i = 0; i < 3; ++i) prompt.push_back(37 * i % 4000 + 5);
  Generation generation(model, prompt, {{}, count, {}});
  Text text;
  while (const auto token = generation.next()) text.ids.push_back(*token);
  text.hash = generation.stats().logits_hash;
  return text;
}

const Text& expected() {
  static const Text text = generate(Model::load(kModel, with("", "", "100%")));
  return text;
}

// A store that is slow and fails as it is told to.
class FaultyStore : public ExpertStore {
 public:
  struct Faults {
    int max_delay_us = 0;
    std::atomic<int> calls_before_failure{-1};  // then two fail: a piece and its second attempt
    std::atomic<bool> fails_always{false};
    std::atomic<std::uint64_t> bytes{0};
  };
  FaultyStore(std::unique_ptr<ExpertStore> inner, std::shared_ptr<Faults> faults)
      : inner_(std::move(inner)), faults_(std::move(faults)) {}

  std::size_t num_pieces(const SegmentRead& read) const override {
    return inner_->num_pieces(read);
  }
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch& scratch) const override {
    const int call = num_calls_.fetch_add(1);
    if (faults_->max_delay_us != 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(call * 7919 % faults_->max_delay_us));
    }
    const int left = faults_->calls_before_failure.fetch_sub(1);
    if (faults_->fails_always || left == 0 || left == -1) throw FileError("injected: a bad day");
    if (left < -1) faults_->calls_before_failure = -2;
    const std::uint64_t bytes = inner_->read_piece(read, piece, scratch);
    faults_->bytes += bytes;
    return bytes;
  }
  bool is_direct() const override { return inner_->is_direct(); }
  bool is_divisible(ExpertId id) const override { return inner_->is_divisible(id); }

 private:
  std::unique_ptr<ExpertStore> inner_;
  std::shared_ptr<Faults> faults_;
  mutable std::atomic<int> num_calls_{1};
};

std::shared_ptr<FaultyStore::Faults> add_faults(ModelOptions& options, int max_delay_us = 0) {
  auto faults = std::make_shared<FaultyStore::Faults>();
  faults->max_delay_us = max_delay_us;
  faults->calls_before_failure = -2;
  options.experts.wrap_store = [faults](std::unique_ptr<ExpertStore> inner) {
    return std::make_unique<FaultyStore>(std::move(inner), faults);
  };
  return faults;
}

// Of everything but the experts, and of all experts, as page-locked memory.
struct PageLockedLimit {
  explicit PageLockedLimit(std::size_t bytes) {
    cuda_host::set_memory_limit(bytes, cuda_host::Place::pinned_host);
  }
  ~PageLockedLimit() { cuda_host::set_memory_limit(SIZE_MAX, cuda_host::Place::pinned_host); }
};

struct LateCopiesAgain {
  ~LateCopiesAgain() { cuda_host::set_order(cuda_host::Order::late_copies, 1); }
};

}  // namespace

TEST("text keeps its bits for every pin limit, tier, ring, budget, split and prefetch setting") {
  const LateCopiesAgain after;
  std::mt19937_64 random(5);
  const auto pick = [&](const auto& choices) { return choices[random() % choices.size()]; };
  const std::vector<std::string> limits = {"0", "30%", "100%"};
  const std::vector<std::string> tiers = {"auto", "memory", "disk"};
  // Of records, of less than an expert, of some experts.
  const std::vector<std::size_t> rings = {1, 20'000, 70'000, 300'000, 0};
  const std::vector<std::string> budgets = {"8%", "25%", "60%"};
  const TempFolder packs;
  for (int round = 0; round < 5; ++round) {
    cuda_host::set_order(round % 2 == 0 ? cuda_host::Order::late_copies : cuda_host::Order::random,
                         random());
    ModelOptions options =
        with(limits[static_cast<std::size_t>(round) % 3],
             tiers[static_cast<std::size_t>(round + round / 3 + 1) % 3], pick(budgets));
    options.experts.host_ring_bytes = pick(rings);
    options.experts.split = {static_cast<double>(random() % 5) / 4};
    options.experts.prefetch = random() % 3 == 0 ? "off" : "on";
    options.experts.reader_threads = 1 + static_cast<int>(random() % 3);
    if (random() % 3 == 0) options.experts.ring_experts = 1 + random() % 3;
    if (random() % 3 == 0) options.experts.pack_folder = packs.path().string();
    if (random() % 2 == 0) add_faults(options, 200);
    const auto model = Model::load(kModel, options);
    if (generate(model) != expected()) {
      fail(__FILE__, __LINE__, "round ", round, ": other text with pin limit ",
           options.experts.pin_limit, ", tier ", options.experts.host_tier, ", ring ",
           options.experts.host_ring_bytes);
    }
  }
}

TEST("what is not page-locked comes through the store, and is counted") {
  for (const std::string tier : {"memory", "disk"}) {
    ModelOptions options = with("0", tier, "10%");
    options.experts.prefetch = "off";
    options.experts.split = {1.0};
    const auto faults = add_faults(options);
    const auto model = Model::load(kModel, options);
    const HostPlan& plan = *model->host_plan();
    CHECK_EQ(plan.page_locked_bytes, std::size_t{0});
    CHECK_EQ(tier == "disk" ? plan.disk_bytes : plan.pageable_bytes, model->expert_bytes());
    expected();
    const auto begin = std::chrono::steady_clock::now();
    CHECK(generate(model) == expected());
    const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
    const CacheStats stats = model->expert_cache()->stats();
    CacheCounters total;
    for (const auto& layer : stats.layers) total += layer;
    CHECK(stats.link_bytes > 0 && stats.link_bytes <= faults->bytes);
    CHECK(stats.link_busy_seconds > 0 && stats.link_busy_seconds < wall.count());
    CHECK_EQ(total.demand_bytes, stats.link_bytes);
    if (tier == "memory") {
      CHECK_EQ(total.demand_bytes, total.misses * (model->expert_bytes() / kExperts));
    }
    const std::string json = stats_json(*model);
    CHECK(json.find("\"host\":{\"tier\":\"" + tier + "\"") != std::string::npos);
  }
}

TEST("with everything page-locked nothing is read") {
  const auto model = Model::load(kModel, with("", ""));
  CHECK_EQ(model->host_plan()->page_locked_bytes, model->expert_bytes());
  CHECK_EQ(model->host_plan()->ring_bytes(), std::size_t{0});
  CHECK(generate(model) == expected());
  CHECK(model->load_stats().notes.empty());
}

TEST("the disk tier loads no experts") {
  const auto all = Model::load(kModel, with("0", "memory"))->load_stats().bytes;
  const auto none = Model::load(kModel, with("", "disk"))->load_stats().bytes;
  const auto half = Model::load(kModel, with("50%", "disk"))->load_stats().bytes;
  const auto model = Model::load(kModel, with("", "disk"));
  CHECK_EQ(none + model->expert_bytes(), all);
  CHECK_EQ(none + model->expert_bytes() / 2, half);
}

TEST("a store that keeps failing ends the text with its error, and works again when it does") {
  for (const std::string tier : {"memory", "disk"}) {
    ModelOptions options = with("30%", tier);
    options.experts.prefetch = tier == "disk" ? "on" : "off";
    const auto faults = add_faults(options, 50);
    const auto model = Model::load(kModel, options);
    faults->fails_always = true;
    for (int i = 0; i < 2; ++i) CHECK_THROWS(FileError, generate(model), "bad day");
    faults->fails_always = false;
    CHECK(generate(model) == expected());
  }
}

TEST("a failure anywhere leaves no slot that claims what it does not hold") {
  const LateCopiesAgain after;
  std::mt19937_64 random(8);
  for (int round = 0; round < 2; ++round) {
    cuda_host::set_order(cuda_host::Order::random, random());
    ModelOptions options = with("30%", round % 2 == 0 ? "memory" : "disk", "40%");
    options.experts.reader_threads = 1;
    options.experts.host_ring_bytes = round % 3 == 0 ? 70'000 : 0;
    options.experts.prefetch = "on";
    options.experts.split = {round % 4 == 0 ? 0.5 : 1.0};
    const auto faults = add_faults(options);
    const auto model = Model::load(kModel, options);
    faults->calls_before_failure = static_cast<int>(random() % 200);
    try {
      generate(model);
    } catch (const FileError&) {
    }
    faults->calls_before_failure = -2;
    CHECK(generate(model) == expected());
  }
}

TEST("an interruption while experts are on their way leaves the cache whole") {
  ModelOptions options = with("0", "memory");
  options.experts.host_ring_bytes = 70'000;
  options.experts.prefetch = "on";
  add_faults(options, 300);
  const auto model = Model::load(kModel, options);
  for (int stop_at = 1; stop_at < 30; stop_at += 14) {
    Generation generation(model, {5, 6, 7}, {{}, 6, {}});
    int calls = 0;
    const auto stop = [&] {
      if (++calls == stop_at) throw Interrupted("stop");
    };
    const auto run = [&] {
      while (generation.next(stop)) {
      }
    };
    CHECK_THROWS(Interrupted, run(), "stop");
  }
  CHECK(generate(model) == expected());
}

TEST("page-locked memory that is refused is said, and the text stays the same") {
  const std::size_t total = Model::load(kModel, with("", ""))->expert_bytes();
  std::size_t before = SIZE_MAX;
  for (const std::size_t percent : {90, 60, 30}) {
    for (const std::string tier : {"auto", "disk"}) {
      const PageLockedLimit limit(total * percent / 100);
      const auto model = Model::load(kModel, with("100%", tier));
      const HostPlan& plan = *model->host_plan();
      CHECK_EQ(plan.notes.size(), std::size_t{1});
      CHECK(plan.notes[0].find("refused") != std::string::npos);
      CHECK_EQ(model->load_stats().notes[0], plan.notes[0]);
      CHECK_EQ(plan.page_locked_bytes + plan.pageable_bytes + plan.disk_bytes, total);
      CHECK_EQ(tier == "disk" ? plan.pageable_bytes : plan.disk_bytes, std::size_t{0});
      CHECK(plan.page_locked_bytes + plan.ring_bytes() <= total * percent / 100);
      CHECK(plan.page_locked_bytes <= before);
      before = plan.page_locked_bytes;
      // Layers differ by one round of experts at most.
      std::size_t least = 32;
      std::size_t most = 0;
      for (const HostShare& layer : plan.layers) {
        least = std::min(least, layer.page_locked);
        most = std::max(most, layer.page_locked);
      }
      CHECK(most - least <= 4);
      if (percent == 90) CHECK(generate(model) == expected());
    }
  }
}

TEST("where experts could take all page-locked memory, some is left for the rest") {
  const std::size_t total = Model::load(kModel, with("", ""))->expert_bytes();
  for (std::size_t short_of = 1; short_of < total; short_of += total / 3) {
    const PageLockedLimit limit(total - short_of + (2 << 20));
    CHECK(generate(Model::load(kModel, with("", "")), 1).ids[0] == expected().ids[0]);
  }
}

TEST("without any page-locked memory a model that needs it is refused") {
  const PageLockedLimit limit(0);
  CHECK_THROWS(OutOfMemory, Model::load(kModel, with("0", "memory")), "ring", "page-locked",
               "--pin-limit");
}

TEST("a dry run says where the host would keep experts") {
  const std::string json = dry_run_json(kModel, with("50%", "disk"));
  CHECK(json.find("\"host\":{\"tier\":\"disk\"") != std::string::npos);
  CHECK(json.find("\"pageable_bytes\":0") != std::string::npos);
  CHECK(dry_run_json(kModel, with("50%", "disk", "100%")).find("\"host\":null") !=
        std::string::npos);
  CHECK_THROWS(InvalidArgument, dry_run_json(kModel, with("lots", "", "100%")), "pin_limit");
}

}  // namespace moerun::test
