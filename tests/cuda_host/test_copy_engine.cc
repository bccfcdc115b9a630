// Transfers from every tier of the host to a device: what lands, in which order, and that it does.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert/copy_engine.h"
#include "expert/host_memory_tiers.h"
#include "expert/memory_store.h"
#include "host/device.h"
#include "host/host_backend.h"
#include "model/model.h"

namespace moerun::test {
namespace {

const std::string kModel = MOERUN_TEST_MODEL;
constexpr std::size_t kExperts = 32;  // of a layer of that model

// Keeps the reads of some experts until they are let go, or fails them.
class GatedStore : public ExpertStore {
 public:
  explicit GatedStore(std::unique_ptr<ExpertStore> inner) : inner_(std::move(inner)) {}
  std::size_t num_pieces(const SegmentRead& read) const override {
    return inner_->num_pieces(read);
  }
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch& scratch) const override {
    while (is_shut) std::this_thread::sleep_for(std::chrono::microseconds(50));
    if (failing_expert == static_cast<int>(read.id.expert)) throw FileError("injected");
    return inner_->read_piece(read, piece, scratch);
  }
  bool is_direct() const override { return inner_->is_direct(); }
  bool is_divisible(ExpertId id) const override { return inner_->is_divisible(id); }

  std::atomic<bool> is_shut{false};
  std::atomic<int> failing_expert{-1};

 private:
  std::unique_ptr<ExpertStore> inner_;
};

// A third of the experts in every tier, and an engine over them.
struct Bench {
  explicit Bench(std::size_t ring_bytes, int threads = 2) {
    ExpertCacheOptions options;
    options.host_ring_bytes = ring_bytes;
    plan = plan_model(kModel, {});
    HostPlan host = plan_host_memory(*plan.weights, options, std::size_t{64} << 30);
    for (HostShare& layer : host.layers) layer.page_locked = kExperts / 3;
    plan_the_rest(host, *plan.weights, options);
    for (HostShare& layer : host.layers) layer.pageable = kExperts / 3;
    backend = cuda_host::make_backend();
    tiers = take_host_memory(*plan.weights, host, options, *backend);
    ThreadPool loaders(1);
    plan.weights->load(loaders, {}, *tiers.experts);
    store = std::make_unique<GatedStore>(std::make_unique<MemoryStore>(
        *plan.weights, *tiers.experts, std::make_unique<CheckpointStore>(*plan.weights)));
    stream = backend->make_stream();
    queue = backend->make_copy_queue();
    engine = std::make_unique<CopyEngine>(
        *plan.weights, *tiers.experts, *queue,
        std::make_unique<HostStage>(*plan.weights, *store,
                                    Bytes{tiers.ring->data(), tiers.ring->size()},
                                    tiers.plan.ring_block_bytes, progress, threads));
    engine->begin_pass(*stream);
    record_bytes = plan.weights->layers[0].record_bytes();
    records = plan.weights->layers[0].experts.intermediate_size;
  }

  // What the records of an expert are.
  std::vector<std::byte> truth(ExpertId id) const {
    std::vector<std::byte> bytes(records * record_bytes);
    const CheckpointStore files(*plan.weights);
    const SegmentRead read{id, 0, records, {{0, records, bytes.data()}}};
    ReadScratch scratch;
    for (std::size_t i = 0; i < files.num_pieces(read); ++i) files.read_piece(read, i, scratch);
    return bytes;
  }

  // Looks, like a lease, until `is_over`; false: it has not been for long.
  bool wait_until(const std::function<bool()>& is_over) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (;;) {
      const auto seen = progress.now();
      if (is_over()) return true;
      if (std::chrono::steady_clock::now() > deadline) return false;
      progress.wait_beyond(seen, std::chrono::milliseconds(engine->has_silent_progress() ? 0 : 20));
    }
  }

  ModelPlan plan;
  Progress progress;
  std::unique_ptr<Backend> backend;
  HostMemoryTiers tiers;
  std::unique_ptr<GatedStore> store;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<CopyQueue> queue;
  std::size_t record_bytes = 0;
  std::size_t records = 0;
  std::unique_ptr<CopyEngine> engine;
};

// A segment on its way to memory of its own, scattered over runs.
struct Job {
  ExpertId id;
  std::size_t first = 0;
  std::size_t count = 0;
  std::unique_ptr<DeviceBuffer> memory;
  std::shared_ptr<Transfer> transfer;
};

Job submit(Bench& bench, ExpertId id, std::size_t first, std::size_t count, Urgency urgency,
           std::size_t run_records = 32) {
  Job job{id, first, count, nullptr, nullptr};
  job.memory =
      bench.backend->allocate(count * bench.record_bytes, "a segment", MemoryUse::streamed);
  SegmentRead read{id, first, count, {}};
  for (std::size_t done = 0; done < count; done += run_records) {
    read.runs.push_back({first + done, std::min(run_records, count - done),
                         job.memory->data() + done * bench.record_bytes});
  }
  job.transfer = bench.engine->submit(std::move(read), {}, urgency);
  return job;
}

bool is_right(Bench& bench, const Job& job) {
  const auto truth = bench.truth(job.id);
  return std::memcmp(job.memory->data(), truth.data() + job.first * bench.record_bytes,
                     job.count * bench.record_bytes) == 0;
}

struct LateCopiesAgain {
  ~LateCopiesAgain() { cuda_host::set_order(cuda_host::Order::late_copies, 1); }
};

}  // namespace

TEST("segments of every tier arrive whole, however they are promoted, cancelled and drained") {
  const LateCopiesAgain after;
  std::mt19937_64 random(2);
  for (const std::size_t ring : {1ul, 20'000ul, 60'000ul, 200'000ul, 0ul}) {
    cuda_host::set_order(ring % 3 == 0 ? cuda_host::Order::late_copies : cuda_host::Order::random,
                         random());
    Bench bench(ring, 1 + static_cast<int>(random() % 3));
    for (int round = 0; round < 12; ++round) {
      std::vector<Job> jobs;
      for (int i = 0; i < 10; ++i) {
        const std::size_t first = random() % bench.records;
        jobs.push_back(submit(bench, {random() % 8, random() % kExperts}, first,
                              1 + random() % (bench.records - first),
                              random() % 2 == 0 ? Urgency::demand : Urgency::prefetch,
                              1 + random() % 70));
        Job& any = jobs[random() % jobs.size()];
        const std::size_t what = random() % 6;
        if (what == 0) bench.engine->cancel(any.transfer);
        if (what == 1) bench.engine->drain(any.transfer);
        if (what < 2) std::swap(any, jobs.back());
        if (what < 2) bench.queue->synchronize();  // before its memory goes
        if (what < 2) jobs.pop_back();
        if (what == 2) bench.engine->promote(any.transfer);
        if (what == 3) bench.engine->look();
      }
      for (const Job& job : jobs) {
        CHECK(bench.wait_until([&] { return bench.engine->is_complete(*job.transfer); }));
        CHECK(bench.engine->is_usable(*job.transfer));
        CHECK(bench.engine->bytes_read(*job.transfer) >= job.count * bench.record_bytes);
        CHECK(is_right(bench, job));
      }
    }
    CHECK(bench.wait_until([&] {
      bench.engine->look();
      return !bench.engine->has_silent_progress();
    }));
    // Nothing keeps room in the ring: a segment that needs much of it still gets it.
    const Job last = submit(bench, {7, kExperts - 1}, 0, bench.records, Urgency::demand);
    CHECK(bench.wait_until([&] { return bench.engine->is_complete(*last.transfer); }));
    CHECK(is_right(bench, last));
  }
}

TEST("demand overtakes prefetch that fills the ring, and does not wait for it to be wanted") {
  Bench bench(60'000, 1);
  bench.store->is_shut = true;
  std::vector<Job> guesses;
  for (std::size_t expert = 12; expert < 18; ++expert) {
    guesses.push_back(submit(bench, {1, expert}, 0, bench.records, Urgency::prefetch));
  }
  const Job demand = submit(bench, {2, 15}, 0, bench.records, Urgency::demand);
  bench.store->is_shut = false;
  CHECK(bench.wait_until([&] { return bench.engine->is_usable(*demand.transfer); }));
  CHECK(std::any_of(guesses.begin(), guesses.end(),
                    [&](const Job& guess) { return !bench.engine->is_usable(*guess.transfer); }));
  for (const Job& guess : guesses) {
    CHECK(bench.wait_until([&] { return bench.engine->is_complete(*guess.transfer); }));
    CHECK(is_right(bench, guess));
  }
  CHECK(is_right(bench, demand));
}

TEST("a failure of reading is thrown where its transfer is looked at, and nowhere else") {
  for (const std::size_t expert : {15ul, 30ul}) {  // in pageable memory, on disk
    Bench bench(60'000);
    bench.store->failing_expert = static_cast<int>(expert);
    const Job broken = submit(bench, {0, expert}, 0, bench.records, Urgency::demand);
    const Job whole = submit(bench, {0, expert - 1}, 0, bench.records, Urgency::demand);
    CHECK(bench.wait_until([&] { return bench.engine->is_complete(*whole.transfer); }));
    CHECK(is_right(bench, whole));
    CHECK_THROWS(FileError,
                 bench.wait_until([&] { return bench.engine->is_usable(*broken.transfer); }),
                 "injected");
    CHECK_THROWS(FileError, bench.engine->is_complete(*broken.transfer), "injected");
    bench.engine->drain(broken.transfer);
    bench.store->failing_expert = -1;
    const Job again = submit(bench, {0, expert}, 0, bench.records, Urgency::demand);
    CHECK(bench.wait_until([&] { return bench.engine->is_complete(*again.transfer); }));
    CHECK(is_right(bench, again));
  }
}

TEST("bytes and busy time of every tier add up") {
  Bench bench(0);
  std::uint64_t moved = 0;
  for (const std::size_t expert : {0ul, 15ul, 30ul}) {
    const Job job = submit(bench, {3, expert}, 0, bench.records, Urgency::demand);
    CHECK(bench.wait_until([&] { return bench.engine->is_complete(*job.transfer); }));
    moved += bench.engine->bytes_read(*job.transfer);
    CHECK_EQ(bench.engine->stats().bytes, moved);
    if (expert < 20) {
      CHECK_EQ(bench.engine->bytes_read(*job.transfer), bench.records * bench.record_bytes);
    }
  }
  bench.engine->look();
  const double busy = bench.engine->stats().busy_seconds;
  CHECK(busy > 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  bench.engine->look();
  CHECK_EQ(bench.engine->stats().busy_seconds, busy);
}

}  // namespace moerun::test
