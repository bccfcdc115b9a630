// A device that fails in the middle of its work: the cause is reported once, the model is closed,
// nothing crashes, and a new model works when the device does again.
#include <string>

#include "base/error.h"
#include "check.h"
#include "device_limits.h"
#include "model/forward.h"
#include "model/generation.h"
#include "test_prompt.h"

namespace moerun::test {
namespace {

struct Outcome {
  std::vector<std::int32_t> ids;
  std::string error;
};

Outcome generate(const std::shared_ptr<Model>& model) {
  Outcome outcome;
  try {
    Generation generation(model, some_tokens(9), {{}, 3, {}});
    while (const auto token = generation.next()) outcome.ids.push_back(*token);
  } catch (const DeviceError& error) {
    outcome.error = error.what();
  }
  return outcome;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

ModelOptions cached() {
  ModelOptions options = on_device("20%");
  options.experts.prefetch = "on";
  options.experts.split = {0.5};
  return options;
}

}  // namespace

TEST("a device error names its cause once and closes the model for good") {
  for (const ModelOptions& options : {on_device(), cached()}) {
    const auto model = Model::load(kModel, options);
    const auto expected = generate(model);
    Generation other(model, some_tokens(5), {{}, 20, {}});
    CHECK(other.next());
    Session session(model);
    {
      const FailureAfter failure(40);
      const std::string first = generate(model).error;
      CHECK(contains(first, "a failure that a test asked for"));
      // Where the device needs no host, nobody looks before the end of the token.
      CHECK(options.experts.budget.empty() || contains(first, "noticed in layer "));
      CHECK(!contains(first, "was closed"));
    }
    // The device works again, but what was on it is lost.
    const std::vector<std::string> parts = {"the model was closed after a device error: ",
                                            "a failure that a test asked for", "; load it again"};
    std::vector<float> logits(static_cast<std::size_t>(model->config().vocab_size));
    for (int times = 0; times < 2; ++times) {
      CHECK_THROWS(DeviceError, other.next(), parts[0], parts[1], parts[2]);
      CHECK_THROWS(DeviceError, forward(model, some_tokens(1), logits), parts[0], parts[1]);
      CHECK_THROWS(DeviceError, session.append(some_tokens(1), logits, {}), parts[0], parts[1]);
      CHECK_THROWS(DeviceError, Session(model), parts[0], parts[1]);
      CHECK(contains(generate(model).error, parts[0]));
    }
    CHECK(generate(Model::load(kModel, options)).ids == expected.ids);
  }
}

TEST("the message of a kernel that fails has its name") {
  const auto model = Model::load(kModel, on_device());
  const FailureAfter failure(2);  // the first is the copy of the token ids
  CHECK(contains(generate(model).error, "embed: a failure"));
}

TEST("whatever fails, while loading or computing, nothing crashes and all memory comes back") {
  const auto expected = generate(Model::load(kModel, cached()));
  const std::size_t before = cuda_host::bytes_allocated();
  const std::size_t pinned_before = cuda_host::bytes_allocated(cuda_host::Place::pinned_host);
  std::size_t num_failed = 0;
  for (std::uint64_t n = 1; n < 1200; n = n * 7 / 5 + 1) {
    const FailureAfter failure(n);
    try {
      const auto model = Model::load(kModel, cached());
      const Outcome outcome = generate(model);
      num_failed += !outcome.error.empty();
      if (!outcome.error.empty()) CHECK(contains(generate(model).error, "was closed"));
    } catch (const DeviceError&) {
      ++num_failed;
    }
  }
  CHECK(num_failed > 10);
  CHECK_EQ(cuda_host::bytes_allocated(), before);
  CHECK_EQ(cuda_host::bytes_allocated(cuda_host::Place::pinned_host), pinned_before);
  CHECK(generate(Model::load(kModel, cached())).ids == expected.ids);
}

TEST("an error that ends the process's use of the device says so, and not to load again") {
  const auto model = Model::load(kModel, on_device());
  cuda_host::spoil(std::make_exception_ptr(DeviceError("an illegal address; restart", true)));
  const std::string first = generate(model).error;
  cuda_host::reset();
  CHECK(contains(first, "an illegal address; restart"));
  const std::string second = generate(model).error;
  CHECK(contains(second, "was closed after a device error: an illegal address; restart"));
  CHECK(!contains(second, "load it again"));
}

TEST("memory that runs out in the middle closes nothing") {
  const auto model = Model::load(kModel, on_device());
  const auto expected = generate(model);
  {
    const Session other(model);  // has what a session leaves for the next
    const MemoryLimit limit(1000);
    CHECK_THROWS(OutOfMemory, Session(model), "of device memory were asked for", "in use");
  }
  CHECK(generate(model).ids == expected.ids);
}

}  // namespace moerun::test
