// Shares the rows of several sequences out among the threads of one loop.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "device/op_params.h"

namespace moerun {

// The items of a parallel loop, a run of them for each sequence. The pool hands items out in their
// order, so the sequences whose items take longest come first: none is left alone at the end.
class SequenceItems {
 public:
  struct Item {
    const SequenceRows* sequence;
    std::size_t first_row;  // of the sequence, among the rows of all
    std::size_t number;     // of the item, within its sequence
  };

  // num_items(sequence) of each; `work`: what one of them costs, compared with those of the others.
  // `sequences` is used until the next call.
  template <typename Count, typename Work>
  void list(std::span<const SequenceRows> sequences, const Count& num_items, const Work& work) {
    runs_.clear();
    std::size_t row = 0;
    for (const SequenceRows& each : sequences) {
      runs_.push_back({&each, row, work(each), 0});
      row += each.num_rows;
    }
    std::sort(runs_.begin(), runs_.end(), [](const Run& a, const Run& b) {
      return a.work != b.work ? a.work > b.work : a.first_row < b.first_row;
    });
    size_ = 0;
    for (Run& run : runs_) {
      run.first_item = size_;
      size_ += num_items(*run.sequence);
    }
  }

  std::size_t size() const { return size_; }

  Item at(std::size_t item) const {
    const auto behind = std::upper_bound(
        runs_.begin(), runs_.end(), item,
        [](std::size_t wanted, const Run& run) { return wanted < run.first_item; });
    const Run& run = *(behind - 1);
    return {run.sequence, run.first_row, item - run.first_item};
  }

 private:
  struct Run {
    const SequenceRows* sequence;
    std::size_t first_row;
    std::size_t work;
    std::size_t first_item;
  };

  std::vector<Run> runs_;
  std::size_t size_ = 0;
};

}  // namespace moerun
