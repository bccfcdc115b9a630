// Operations for several sequences at once on the CPU: the same bits as for each alone.
#include <algorithm>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "device/cpu/kernel_table.h"
#include "device/cpu/sequence_items.h"
#include "sequence_batch.h"

namespace moerun::test {
namespace {

// A batch in the host's memory.
class Case {
 public:
  explicit Case(const SequenceBatch& of_batch) : batch_(of_batch) {
    RandomWeights random(batch_.sizes.size());
    qkv_ = random.matrix(batch_.num_rows(), batch_.qkv_cols());
    for (std::size_t s = 0; s < batch_.sizes.size(); ++s) {
      const std::size_t rows = batch_.shape.num_kv_heads * batch_.capacity(s);
      keys_.push_back(random.matrix(rows, batch_.shape.head_dim));
      values_.push_back(random.matrix(rows, batch_.shape.head_dim));
    }
  }

  // What is in qkv, out, and the KV caches of all sequences afterwards.
  std::vector<std::vector<float>> run(Backend& backend, bool each_alone) {
    const auto stream = backend.make_stream();
    auto qkv = qkv_;
    auto keys = keys_;
    auto values = values_;
    std::vector<float> out(batch_.num_rows() * padded(batch_.out_cols()));
    std::vector<SequenceRows> sequences;
    for (std::size_t s = 0; s < batch_.sizes.size(); ++s) {
      sequences.push_back(
          {batch_.sizes[s].num_rows,
           batch_.sizes[s].first_position,
           {keys[s].data(), values[s].data(), batch_.capacity(s), padded(batch_.shape.head_dim)}});
    }
    const Activations in{qkv.data(), batch_.num_rows(), batch_.qkv_cols(),
                         padded(batch_.qkv_cols())};
    const Activations result{out.data(), batch_.num_rows(), batch_.out_cols(),
                             padded(batch_.out_cols())};
    if (each_alone) {
      std::size_t row = 0;
      for (const SequenceRows& one : sequences) {
        const Activations own = in.slice(row, one.num_rows);
        backend.rotate_and_store(*stream, batch_.shape, batch_.rotary, one.first_position, own,
                                 one.kv);
        backend.attention(*stream, batch_.shape, batch_.attention, one.first_position, own, one.kv,
                          result.slice(row, one.num_rows));
        row += one.num_rows;
      }
    } else {
      backend.rotate_and_store_batch(*stream, batch_.shape, batch_.rotary, sequences, in);
      backend.attention_batch(*stream, batch_.shape, batch_.attention, sequences, in, result);
    }
    std::vector<std::vector<float>> all = {qkv, out};
    all.insert(all.end(), keys.begin(), keys.end());
    all.insert(all.end(), values.begin(), values.end());
    return all;
  }

 private:
  const SequenceBatch& batch_;
  std::vector<float> qkv_;
  std::vector<std::vector<float>> keys_;
  std::vector<std::vector<float>> values_;
};

}  // namespace

TEST("several sequences rotate, store and attend with the bits of each alone") {
  const std::vector<std::vector<SequenceSize>> batches = {
      {{0, 1}},
      {{5, 1}, {0, 1}, {300, 1}, {64, 1}, {63, 1}},
      {{3, 2}, {40, 1}, {0, 17}, {7, 0}, {90, 1}, {12, 30}},
  };
  for (const auto& sizes : batches) {
    for (const AttentionShape& shape : {AttentionShape{6, 2, 40}, AttentionShape{3, 3, 64}}) {
      SequenceBatch batch(shape, sizes);
      for (const std::size_t window : {0u, 20u}) {
        batch.attention.window = window;
        for (const auto& name : supported_cpu_kernels()) {
          Case one(batch);
          const auto alone = one.run(*make_cpu_backend(1, name), true);
          for (const int threads : {1, 2, 4}) {
            CHECK(one.run(*make_cpu_backend(threads, name), false) == alone);
          }
        }
      }
    }
  }
}

TEST("the longest of several sequences are begun first, and every item once") {
  const std::vector<SequenceRows> sequences = {{1, 10, {}}, {2, 500, {}}, {0, 9, {}}, {3, 40, {}}};
  SequenceItems items;
  items.list(
      sequences, [](const SequenceRows& each) { return 2 * each.num_rows; },
      [](const SequenceRows& each) { return each.first_position; });
  CHECK_EQ(items.size(), std::size_t{12});
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const SequenceItems::Item item = items.at(i);
    if (item.number == 0) order.push_back(item.sequence->first_position);
    const auto index = static_cast<std::size_t>(item.sequence - sequences.data());
    CHECK_EQ(item.first_row, std::vector<std::size_t>({0, 1, 3, 3})[index]);
    CHECK(item.number < 2 * item.sequence->num_rows);
    if (i > 0 && item.number > 0) CHECK_EQ(item.number, items.at(i - 1).number + 1);
  }
  CHECK(order == std::vector<std::size_t>({500, 40, 10}));
}

TEST("sequences that do not fit their rows or their KV caches are refused") {
  const auto backend = make_cpu_backend(1, "auto");
  const auto stream = backend->make_stream();
  std::vector<float> numbers(4 * 96);
  const Activations rows{numbers.data(), 2, 96, 96};
  const KvLayer kv{numbers.data(), numbers.data(), 1, 32};
  const std::vector<SequenceRows> three = {{2, 0, {nullptr, nullptr, 2, 32}}, {1, 0, kv}};
  const std::vector<SequenceRows> late = {{1, 0, kv}, {1, 1, kv}};
  CHECK_THROWS(InvalidArgument,
               backend->rotate_and_store_batch(*stream, {1, 1, 32}, {}, three, rows), "3 rows",
               "2 sequences", "found 2");
  CHECK_THROWS(InvalidArgument, backend->attention_batch(*stream, {1, 1, 32}, {}, late, rows, rows),
               "position 1", "1 tokens");
}

}  // namespace moerun::test
