// Operations for several sequences at once: as on the CPU, and with the bits of each alone.
#include <limits>
#include <memory>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "kernels/attention.h"
#include "kernels/rope.h"
#include "kernels/sequence_list.h"
#include "on_device.h"
#include "sequence_batch.h"

namespace moerun::test {
namespace {

// A batch in both places.
class Case {
 public:
  explicit Case(SequenceBatch& of_batch)
      : out(of_batch.num_rows(), of_batch.out_cols()),
        batch_(of_batch),
        random_(of_batch.sizes.size()),
        qkv_(random_.matrix(of_batch.num_rows(), of_batch.qkv_cols()), of_batch.num_rows(),
             of_batch.qkv_cols()),
        inv_freq_(of_batch.inv_freq) {
    for (std::size_t s = 0; s < batch_.sizes.size(); ++s) {
      for (auto* part : {&keys_, &values_}) {
        const std::size_t rows = batch_.shape.num_kv_heads * batch_.capacity(s);
        part->push_back(std::make_unique<TestRows>(random_.matrix(rows, batch_.shape.head_dim),
                                                   rows, batch_.shape.head_dim));
        forget_behind(*part->back(), s);
      }
    }
  }

  TestRows out;

  void run_on_cpu() {
    const auto cpu = make_cpu_backend(1, "portable");
    const auto stream = cpu->make_stream();
    batch_.rotary.inv_freq = batch_.inv_freq.data();
    const auto sequences = list([](TestRows& rows) { return rows.host(); });
    cpu->rotate_and_store_batch(*stream, batch_.shape, batch_.rotary, sequences, qkv_.host());
    cpu->attention_batch(*stream, batch_.shape, batch_.attention, sequences, qkv_.host(),
                         out.host());
  }

  // Once: queries are rotated in place.
  void run_on_device(bool each_alone) {
    const auto device = make_device_backend();
    const auto stream = device->make_stream();
    batch_.rotary.inv_freq = inv_freq_.data();
    const auto sequences = list([](TestRows& rows) { return rows.device(); });
    if (each_alone) {
      std::size_t row = 0;
      for (const SequenceRows& one : sequences) {
        const Activations own = qkv_.device().slice(row, one.num_rows);
        device->rotate_and_store(*stream, batch_.shape, batch_.rotary, one.first_position, own,
                                 one.kv);
        device->attention(*stream, batch_.shape, batch_.attention, one.first_position, own, one.kv,
                          out.device().slice(row, one.num_rows));
        row += one.num_rows;
      }
    } else {
      device->rotate_and_store_batch(*stream, batch_.shape, batch_.rotary, sequences,
                                     qkv_.device());
      device->attention_batch(*stream, batch_.shape, batch_.attention, sequences, qkv_.device(),
                              out.device());
    }
    stream->synchronize();
  }

  void check_qkv(double tolerance) const { qkv_.check_same(tolerance); }

 private:
  template <typename Side>
  std::vector<SequenceRows> list(const Side& side) {
    std::vector<SequenceRows> sequences;
    for (std::size_t s = 0; s < batch_.sizes.size(); ++s) {
      const Activations keys = side(*keys_[s]);
      sequences.push_back({batch_.sizes[s].num_rows,
                           batch_.sizes[s].first_position,
                           {keys.data, side(*values_[s]).data, batch_.capacity(s), keys.pitch}});
    }
    return sequences;
  }
  // Nobody has written the new rows, nor what is behind them.
  void forget_behind(TestRows& rows, std::size_t sequence) {
    const std::size_t capacity = batch_.capacity(sequence);
    for (std::size_t h = 0; h < batch_.shape.num_kv_heads; ++h) {
      for (std::size_t p = batch_.sizes[sequence].first_position; p < capacity; ++p) {
        std::fill_n(rows.device().row(h * capacity + p), batch_.shape.head_dim,
                    std::numeric_limits<float>::quiet_NaN());
      }
    }
  }

  SequenceBatch& batch_;
  RandomWeights random_;
  TestRows qkv_;
  OnDevice<float> inv_freq_;
  std::vector<std::unique_ptr<TestRows>> keys_;
  std::vector<std::unique_ptr<TestRows>> values_;
};

// Against the CPU, and against each alone on the device.
void check_batch(SequenceBatch& batch, double tolerance) {
  Case together(batch);
  together.run_on_cpu();
  together.run_on_device(false);
  together.check_qkv(1e-5);
  together.out.check_same(tolerance);
  Case alone(batch);
  alone.run_on_device(true);
  for (std::size_t r = 0; r < batch.num_rows(); ++r) {
    CHECK(together.out.row(r) == alone.out.row(r));
  }
}

}  // namespace

TEST("several sequences attend as on the CPU, with the bits of each alone") {
  // Heads that share a key: 1, 2, 3, 9.
  for (const AttentionShape& shape : {AttentionShape{3, 3, 40}, AttentionShape{2, 1, 128},
                                      AttentionShape{6, 2, 64}, AttentionShape{9, 1, 20}}) {
    SequenceBatch batch(shape, {{0, 1}, {300, 1}, {63, 1}, {64, 1}, {17, 1}, {700, 1}});
    for (const std::size_t window : {0u, 50u}) {
      batch.attention.window = window;
      check_batch(batch, 1e-5);
    }
  }
}

TEST("splits of many keys hold more than one tile, also among short sequences") {
  SequenceBatch batch({2, 1, 32}, {{3, 1}, {64 * 64 + 70, 1}, {200, 1}});
  check_batch(batch, 1e-5);
}

TEST("more sequences than one launch takes, some with several rows") {
  SequenceBatch batch({2, 1, 32}, {});
  for (std::size_t s = 0; s < cuda::kMaxSequences + 5; ++s) batch.sizes.push_back({s * 7 % 90, 1});
  batch.sizes.push_back({70, 9});
  batch.sizes.push_back({20, 0});
  batch.sizes.push_back({20, 1});
  batch.sizes.push_back({0, 2});
  for (const std::size_t position : {1u, 2u, 80u}) batch.sizes.push_back({position, 1});
  check_batch(batch, 1e-5);
  batch.attention.may_round = true;
  check_batch(batch, 1e-3);
}

TEST("several sequences in one launch are refused where it does not hold them") {
  TestStream stream;
  const AttentionShape shape{1, 1, 32};
  const KvLayer kv{nullptr, nullptr, 8, 32};
  const std::vector<SequenceRows> many(cuda::kMaxSequences + 1, SequenceRows{1, 0, kv});
  TestRows rows(many.size(), 96);
  const auto rotate = [&](const std::vector<SequenceRows>& sequences) {
    cuda::rotate_and_store_each(stream, shape, {}, sequences,
                                rows.device().slice(0, sequences.size()));
  };
  CHECK_THROWS(InvalidArgument, rotate(many), "65 sequences", "at most 64");
  CHECK_THROWS(InvalidArgument, rotate({{1, 0, kv}, {2, 0, kv}}), "2 rows");
  CHECK_THROWS(InvalidArgument, rotate({{1, 0, kv}, {1, 0, {nullptr, nullptr, 8, 64}}}), "64",
               "32");
  CHECK_THROWS(InvalidArgument, rotate({{1, 0, kv}, {1, 8, kv}}), "position 8", "8 tokens");
  const std::vector<SequenceRows> two = {{1, 0, kv}, {1, 7, kv}};
  const std::size_t needed = cuda::attention_each_scratch_bytes(shape, 2, 8);
  CHECK_THROWS(InvalidArgument,
               cuda::attention_each(stream, shape, {}, two, rows.device().slice(0, 2),
                                    rows.device().slice(0, 2), nullptr, needed - 1),
               "position 7", std::to_string(needed));
}

}  // namespace moerun::test
