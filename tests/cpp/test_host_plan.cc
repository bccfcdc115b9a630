// Which experts of a device the host page-locks, keeps pageable or leaves on disk.
#include <string>

#include "base/error.h"
#include "check.h"
#include "device/cuda_query.h"
#include "expert/budget_text.h"
#include "expert/host_plan.h"
#include "model/device_choice.h"
#include "model/dry_run.h"
#include "model/model.h"

namespace moerun::test {
namespace {

constexpr std::size_t kPlenty = std::size_t{64} << 30;
constexpr std::size_t kMiB = std::size_t{1} << 20;

const ModelWeights& weights() {
  static const ModelPlan plan = plan_model(MOERUN_TEST_MODEL, {});
  return *plan.weights;
}

HostPlan plan_with(const std::string& pin_limit, const std::string& tier = "",
                   std::size_t available = kPlenty) {
  ExpertCacheOptions options;
  options.pin_limit = pin_limit;
  options.host_tier = tier;
  return plan_host_memory(weights(), options, available);
}

// The memory in which so many bytes of experts find room.
std::size_t memory_for(std::size_t expert_bytes) {
  return expert_bytes + weights().resident_bytes() + 256 * kMiB;
}

}  // namespace

TEST("a pin limit is read like a budget, and may be 0") {
  CHECK_EQ(parse_pin_limit("0", 1000), std::size_t{0});
  CHECK_EQ(parse_pin_limit("0%", 1000), std::size_t{0});
  CHECK_EQ(parse_pin_limit("40%", 1000), std::size_t{400});
  CHECK_EQ(parse_pin_limit("8GiB", 1), std::size_t{8} << 30);
  for (const char* text : {"", "all", "-1", "101%", "nan", "3 apples", "0x10"}) {
    CHECK_THROWS(InvalidArgument, parse_pin_limit(text, 1000), "pin_limit", text);
  }
}

TEST("what fits is page-locked, by whole experts and the same share of every layer") {
  const std::size_t total = weights().expert_bytes();
  CHECK_EQ(plan_with("").page_locked_bytes, total);
  CHECK_EQ(plan_with("").ring_bytes(), std::size_t{0});
  for (const std::size_t percent : {0, 1, 30, 50, 99, 100}) {
    const HostPlan plan = plan_with(std::to_string(percent) + "%");
    CHECK(plan.page_locked_bytes <= total * percent / 100);
    std::size_t least = 1000;
    std::size_t most = 0;
    for (const HostShare& layer : plan.layers) {
      CHECK(layer.page_locked + layer.pageable == 32);
      least = std::min(least, layer.page_locked);
      most = std::max(most, layer.page_locked);
    }
    CHECK(most - least <= 1);
    CHECK(total * percent / 100 - plan.page_locked_bytes < weights().layers[0].bytes_per_expert());
    CHECK_EQ(plan.page_locked_bytes + plan.pageable_bytes, total);
    CHECK_EQ(plan.disk_bytes, std::size_t{0});
    CHECK_EQ(plan.ring_bytes() != 0, percent != 100);
    CHECK(plan.notes.empty());
  }
}

TEST("memory that is short is page-locked as far as it goes, and a note says so") {
  const std::size_t total = weights().expert_bytes();
  const HostPlan plan = plan_with("", "", memory_for(total / 2));
  CHECK(plan.page_locked_bytes <= total / 2 && plan.page_locked_bytes > total * 4 / 10);
  CHECK_EQ(plan.page_locked_bytes + plan.pageable_bytes + plan.disk_bytes, total);
  CHECK(plan.disk_bytes >= total / 2);
  CHECK_EQ(plan.notes.size(), std::size_t{1});
  // A limit leaves the rest of the memory to pageable experts, and what asks for no more than
  // there is needs no note.
  const HostPlan limited = plan_with("20%", "", memory_for(total / 2));
  CHECK(limited.page_locked_bytes <= total / 5);
  CHECK(limited.pageable_bytes > total / 4 && limited.disk_bytes >= total / 2);
  CHECK(limited.notes.empty());
  // No memory at all.
  CHECK_EQ(plan_with("", "", 0).disk_bytes, total);
  CHECK(plan_with("", "", 0).ring_blocks >= 2);
}

TEST("the tier decides where experts lie that are not page-locked") {
  const std::size_t total = weights().expert_bytes();
  CHECK_EQ(plan_with("0").pageable_bytes, total);
  CHECK_EQ(plan_with("0", "memory").pageable_bytes, total);
  CHECK_EQ(plan_with("", "memory").page_locked_bytes, total);
  CHECK_EQ(plan_with("", "disk").disk_bytes, total);
  CHECK_EQ(plan_with("50%", "disk").page_locked_bytes, total / 2);
  CHECK_EQ(plan_with("50%", "disk").disk_bytes, total / 2);
  // Closer to the limit of the memory than the other tiers go, but not beyond.
  CHECK_EQ(plan_with("0", "memory", weights().resident_bytes() + total).pageable_bytes, total);
  CHECK_THROWS(OutOfMemory, plan_with("0", "memory", weights().resident_bytes() + total - 1),
               "host_tier", "MiB are free", "disk");
  CHECK_THROWS(InvalidArgument, plan_with("", "tape"), "host_tier", "auto, memory or disk", "tape");
}

TEST("the ring holds whole experts for a checkpoint, and two blocks at least") {
  ExpertCacheOptions options;
  options.host_tier = "disk";
  const std::size_t expert = weights().layers[0].bytes_per_expert();
  CHECK(plan_host_memory(weights(), options, kPlenty).ring_bytes() >= 2 * expert);
  for (const std::size_t bytes : {1ul, 4000ul, 50'000ul, 100'001ul, 10'000'000ul}) {
    options.host_ring_bytes = bytes;
    const HostPlan plan = plan_host_memory(weights(), options, kPlenty);
    CHECK(plan.ring_blocks >= 2);
    CHECK_EQ(plan.ring_block_bytes % weights().layers[0].record_bytes(), std::size_t{0});
    CHECK(plan.ring_bytes() <= std::max(bytes, 2 * weights().layers[0].record_bytes()));
  }
}

TEST("the CPU, which computes where experts are, has no use for a pin limit") {
  for (const char* device : {"cpu", "auto"}) {
    if (choose_device(device, query_cuda()).device != "cpu") continue;
    ModelOptions options;
    options.device = device;
    options.experts.pin_limit = "0";
    CHECK_THROWS(InvalidArgument, plan_model(MOERUN_TEST_MODEL, options), "pin_limit", "CPU");
    CHECK_THROWS(InvalidArgument, Model::load(MOERUN_TEST_MODEL, options), "pin_limit", "CPU");
    options.experts.pin_limit = "";
    options.experts.host_tier = "disk";
    CHECK_THROWS(InvalidArgument, dry_run_json(MOERUN_TEST_MODEL, options), "host_tier", "CPU");
  }
}

}  // namespace moerun::test
