// Decoding that was recorded once and is run again, against decoding step by step.
#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "model/generation.h"
#include "model/session.h"
#include "on_device.h"

namespace moerun::test {
namespace {

ModelOptions on_device() {
  ModelOptions options;
  options.context_length = 100;
  options.threads = 1;
  options.make_backend = make_device_backend;
  return options;
}

// Logits of each token, appended one by one to a prompt.
std::vector<std::vector<float>> decode(const ModelOptions& options, std::size_t prompt,
                                       std::size_t count) {
  const auto model = Model::load(MOERUN_TEST_MODEL, options);
  Session session(model);
  std::vector<std::int32_t> ids(prompt);
  for (std::size_t i = 0; i < prompt; ++i) ids[i] = static_cast<std::int32_t>(31 * i % 4000 + 5);
  session.append(ids, {}, {});
  std::vector<std::vector<float>> all;
  for (std::size_t i = 0; i < count; ++i) {
    all.emplace_back(static_cast<std::size_t>(model->config().vocab_size));
    const std::int32_t token = static_cast<std::int32_t>(97 * i % 4000 + 5);
    session.append({&token, 1}, all.back(), {});
  }
  return all;
}

}  // namespace

TEST("recorded decoding has the bits of decoding step by step") {
  ModelOptions by_the_host = on_device();
  by_the_host.decoder.segment_records = 64;  // cut experts: the host names the segments
  for (const auto order : {Order::late_copies, Order::random}) {
    set_order(order, 5);
    CHECK(decode(on_device(), 3, 3) == decode(by_the_host, 3, 3));
  }
  set_order(Order::late_copies, 1);
}

TEST("a recording is replaced where it serves no longer") {
  ModelOptions by_the_host = on_device();
  by_the_host.decoder.segment_records = 64;
  CHECK(decode(on_device(), 62, 4) == decode(by_the_host, 62, 4));  // past 64 positions
  const auto model = Model::load(MOERUN_TEST_MODEL, on_device());
  const auto other = Model::load(MOERUN_TEST_MODEL, by_the_host);
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  std::vector<std::vector<float>> logits;
  for (const auto& each : {model, other}) {
    Session session(each);
    for (const std::size_t count : {1, 1, 1, 12, 1, 1}) {  // 12: more memory for scratch
      logits.emplace_back(vocab);
      session.append(std::vector<std::int32_t>(count, 11), logits.back(), {});
    }
  }
  for (std::size_t i = 0; i < 6; ++i) CHECK(logits[i] == logits[i + 6]);
}

TEST("two sequences with recordings of their own do not disturb each other") {
  const auto model = Model::load(MOERUN_TEST_MODEL, on_device());
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  const auto append = [&](Session& session, std::int32_t token) {
    std::vector<float> logits(vocab);
    session.append({&token, 1}, logits, {});
    return logits;
  };
  std::vector<std::vector<float>> alone;
  for (const std::int32_t start : {5, 900}) {
    Session session(model);
    for (std::int32_t i = 0; i < 3; ++i) alone.push_back(append(session, start + i));
  }
  Session one(model);
  Session two(model);
  for (std::int32_t i = 0; i < 3; ++i) {
    CHECK(append(one, 5 + i) == alone[static_cast<std::size_t>(i)]);
    CHECK(append(two, 900 + i) == alone[static_cast<std::size_t>(3 + i)]);
  }
}

TEST("what cannot be recorded is refused, and the stream is good afterwards") {
  const auto backend = make_device_backend();
  const auto stream = backend->make_stream();
  const OnDevice<std::int32_t> target(std::vector<std::int32_t>{1});
  const std::int32_t two = 2;
  const auto copy = [&] {
    backend->copy(*stream, reinterpret_cast<std::byte*>(target.data()),
                  reinterpret_cast<const std::byte*>(&two), sizeof(two));
  };
#if defined(MOERUN_CUDA_HOST)  // a card lets some of it pass, and has words of its own
  CHECK_THROWS(DeviceError, backend->record(*stream, [&] { stream->synchronize(); }), "recorded");
  CHECK_THROWS(DeviceError,
               backend->record(*stream, [&] { backend->allocate(8, "x", MemoryUse::streamed); }),
               "recording");
#endif
  const auto work = backend->record(*stream, copy);
  stream->synchronize();
  CHECK_EQ(target.values()[0], 1);  // recorded, not run
  work->run();
  stream->synchronize();
  CHECK_EQ(target.values()[0], 2);
  const auto cpu = make_cpu_backend(1, "portable");
  CHECK_THROWS(InvalidArgument, cpu->record(*cpu->make_stream(), [] {}), "cpu", "record");
}

}  // namespace moerun::test
