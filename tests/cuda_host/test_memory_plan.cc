// Budgets come from the device's memory: what is planned is what is taken, and what does not fit is
// refused before anything is loaded, with what would fit.
#include <string>

#include "base/error.h"
#include "check.h"
#include "device_limits.h"
#include "host/host_backend.h"
#include "model/dry_run.h"
#include "model/generation.h"
#include "test_prompt.h"

namespace moerun::test {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

std::size_t number_before(const std::string& text, const std::string& end) {
  const std::size_t last = text.rfind(end);
  const std::size_t first = text.rfind(' ', last - 1);
  return std::stoull(text.substr(first + 1, last - first - 1));
}

std::size_t number_after(const std::string& json, const std::string& key) {
  const std::string name = "\"" + key + "\":";
  const std::size_t at = json.find(name);
  if (at == std::string::npos) fail(__FILE__, __LINE__, key, " is not in ", json);
  return std::stoull(json.substr(at + name.size()));
}

template <typename Body>
std::string out_of_memory_text(const Body& body) {
  try {
    body();
  } catch (const OutOfMemory& error) {
    return error.what();
  }
  fail(__FILE__, __LINE__, "nothing was refused");
}

// Everything of which a scratch memory could grow: a full prompt chunk, a short one, decoding.
void use(const std::shared_ptr<Model>& model) {
  for (const std::size_t prompt :
       {std::min<std::size_t>(model->context_length() - 4, 44), std::size_t{3}}) {
    Generation generation(model, some_tokens(prompt), {{}, 3, {}});
    while (generation.next()) {
    }
  }
}

}  // namespace

TEST("a model takes the device memory that was planned for it, and no more") {
  for (const std::string budget : {"", "25%"}) {
    ModelOptions options = on_device(budget);
    options.context_length = 64;
    options.prefill_chunk = 40;  // enough for the scratch memory of prompts to count
    const std::size_t before = cuda_host::bytes_allocated();
    const MemoryPlan plan = plan_model(kModel, options).memory;
    CHECK_EQ(cuda_host::bytes_allocated(), before);
    const auto model = Model::load(kModel, options);
    use(model);
    // The pass memory stays with the model, the KV cache goes with its session.
    const std::size_t taken =
        cuda_host::bytes_allocated() - before + plan.needs.kv_cache - model->expert_memory_bytes();
    const std::size_t planned = plan.needs.total() - plan.needs.reserve;
    // Frequencies of the rotation and tables of experts are not counted: the reserve is for such
    // things.
    CHECK_NEAR(static_cast<double>(taken), static_cast<double>(planned), 16384);
  }
}

TEST("without a budget, all experts are resident where they fit, and else as many as do") {
  const MemoryPlan all = plan_model(kModel, on_device()).memory;
  CHECK(all.layout.is_resident);
  const std::size_t experts = all.layout.budget_bytes;
  const std::size_t rest = all.needs.total() - all.needs.reserve;
  {
    const MemoryLimit limit((rest + experts) * 16 / 15 + kMiB);
    CHECK(plan_model(kModel, on_device()).layout().is_resident);
    use(Model::load(kModel, on_device()));
  }
  const MemoryLimit limit((rest + experts / 2) * 16 / 15);
  const auto model = Model::load(kModel, on_device());
  CHECK(!model->cache_layout().is_resident);
  CHECK_NEAR(static_cast<double>(model->cache_layout().budget_bytes) / static_cast<double>(experts),
             0.5, 0.1);
  use(model);
}

TEST("a budget that is larger than the device is refused, and the one that is named fits") {
  const MemoryPlan all = plan_model(kModel, on_device()).memory;
  const std::size_t rest = all.needs.total() - all.needs.reserve;
  const MemoryLimit limit((rest + all.layout.budget_bytes / 2) * 16 / 15);
  const std::string text = out_of_memory_text([] { Model::load(kModel, on_device("90%")); });
  for (const char* part : {"the expert budget asks for", "are left for experts", "for weights",
                           "for the KV cache (context_length 64)", "in use by others"}) {
    if (text.find(part) == std::string::npos) fail(__FILE__, __LINE__, part, ": ", text);
  }
  const std::string before = "a budget of up to ";
  const std::size_t first = text.find(before) + before.size();
  const std::string fitting = text.substr(first, text.find(" fits", first) - first);
  use(Model::load(kModel, on_device(fitting)));  // a size with its unit
  CHECK_THROWS(OutOfMemory, Model::load(kModel, on_device("100%")), "the expert budget asks for");
}

TEST("a context whose KV cache is larger than the device is refused, with the one that fits") {
  ModelOptions options = on_device();
  options.context_length = 512;
  options.prefill_chunk = 32;
  const MemoryPlan all = plan_model(kModel, options).memory;
  const std::size_t rest = all.needs.total() - all.needs.reserve - all.needs.kv_cache / 2;
  const MemoryLimit limit((rest + all.layout.smallest_budget_bytes) * 16 / 15);
  const std::string text = out_of_memory_text([&] { Model::load(kModel, options); });
  CHECK(text.find("context_length 512: the KV cache takes") != std::string::npos);
  options.context_length = static_cast<std::int64_t>(number_before(text, " fits"));
  CHECK(options.context_length > 200);
  CHECK(options.context_length < 300);
  use(Model::load(kModel, options));
}

TEST("a device that another process has filled says so, with or without a budget") {
  const MemoryLimit limit(2 * kMiB);
  for (const std::string budget : {"", "25%"}) {
    CHECK_THROWS(OutOfMemory, Model::load(kModel, on_device(budget)), "too little memory",
                 "for weights", "are free", "in use by others");
  }
}

TEST("page-locked memory that is refused says for what, and what to do") {
  const MemoryLimit limit(kMiB, cuda_host::Place::pinned_host);
  CHECK_THROWS(OutOfMemory, Model::load(kModel, on_device("25%")), "arguments", "page-locked",
               "--pin-limit", "ulimit -l");
}

TEST("a dry run tells the device and its memory") {
  const MemoryLimit limit(512 * kMiB);
  const std::string json = dry_run_json(kModel, on_device("25%"));
  CHECK(json.find("\"device\":\"cuda-host\"") != std::string::npos);
  CHECK_EQ(number_after(json, "device_free_bytes"), 512 * kMiB);
  CHECK(number_after(json, "scratch_bytes") > 0);
  std::size_t taken = 0;
  for (const char* part : {"resident_bytes", "kv_cache_bytes_at_full_context", "activation_bytes",
                           "scratch_bytes", "reserve_bytes"}) {
    taken += number_after(json, part);
  }
  CHECK_EQ(number_after(json, "left_for_experts_bytes"), 512 * kMiB - taken);
}

}  // namespace moerun::test
