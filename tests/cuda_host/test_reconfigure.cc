// Other slots on a device, where copies run beside what computes and may not overlap.
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "model/generation.h"
#include "test_prompt.h"

namespace moerun::test {
namespace {

template <typename Between>
std::vector<std::uint64_t> text_of(const ModelOptions& options, const Between& between) {
  const auto model = Model::load(kModel, options);
  std::vector<std::uint64_t> found;
  Generation generation(model, some_tokens(5), {{}, 6, {}});
  while (const auto token = generation.next()) {
    found.push_back(static_cast<std::uint64_t>(*token));
    found.push_back(generation.stats().logits_hash);
    between(*model);
  }
  return found;
}

}  // namespace

TEST("reconfigure on a device: the bits are the same for any tier of the host and any order") {
  const auto reference = text_of(on_device(), [](Model&) {});
  std::mt19937 random(9);
  struct Case {
    std::string pin_limit;
    std::string host_tier;
    Order order;
  };
  for (const Case& each :
       {Case{"", "", Order::late_copies}, Case{"", "", Order::random},
        Case{"0", "memory", Order::random}, Case{"20%", "disk", Order::random}}) {
    ModelOptions options = on_device("40%");
    options.experts.prefetch = "on";
    options.experts.pin_limit = each.pin_limit;
    options.experts.host_tier = each.host_tier;
    set_order(each.order, random());
    std::size_t num_changed = 0;
    const auto change = [&](Model& model) {
      std::string text =
          R"({"version": 1, "policy": "lcp", "budget_bytes": 1000000000, "layers": [)";
      for (std::size_t layer = 0; layer < 8; ++layer) {
        text += message(layer == 0 ? "" : ",", R"({"layer":)", layer, R"(,"slots":)",
                        3 + random() % 10, R"(,"split":)",
                        static_cast<double>(1 + random() % 4) * 0.25, R"(,"warm":[3,1,2]})");
      }
      try {
        model.reconfigure("plan", text + "]}");
        ++num_changed;
      } catch (const OutOfMemory&) {
      }
    };
    const auto found = text_of(options, change);
    set_order(Order::late_copies, 1);
    CHECK(found == reference);
    CHECK(num_changed > 1);
  }
}

}  // namespace moerun::test
