#include "kernels/argmax.h"

#include "base/error.h"
#include "kernels/best.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 1024;
constexpr unsigned kAhead = 8;  // loads of a thread that are under way at once

struct ArgmaxArguments {
  const float* logits;  // (rows, cols)
  std::size_t pitch;
  std::int32_t* ids;  // (rows)
  unsigned cols;
};

// A block finds the largest of one row; a thread looks at every num_threads()-th element.
// Shared memory: a Best for each warp.
// Preconditions: cols > 0.
MOERUN_KERNEL MOERUN_BOUNDS(kThreads, 1) argmax_kernel(ArgmaxArguments a) {
  auto* of_warps = shared_memory<Best>();
  const float* row = a.logits + block_x() * a.pitch;
  Best best{-INFINITY, kNone};
  for (unsigned first = thread_x(); first < a.cols; first += kAhead * num_threads()) {
    float scores[kAhead];
    MOERUN_UNROLL
    for (unsigned i = 0; i < kAhead; ++i) {
      const unsigned col = first + i * num_threads();
      scores[i] = col < a.cols ? row[col] : -INFINITY;
    }
    MOERUN_UNROLL
    for (unsigned i = 0; i < kAhead; ++i) {
      const unsigned col = first + i * num_threads();
      // One that is no finite number beats them all, and has no id.
      const bool is_bad = col < a.cols && !(fabsf(scores[i]) < INFINITY);
      best = better(best, is_bad ? Best{INFINITY, kNone} : Best{scores[i], col});
    }
  }
  best = best_of_warp(best);
  if (lane() == 0) of_warps[warp()] = best;
  sync_block();
  if (warp() != 0) return;
  best = best_of_warp(of_warps[lane() < num_warps() ? lane() : 0]);
  if (lane() == 0) a.ids[block_x()] = static_cast<std::int32_t>(best.id);
}

}  // namespace

void argmax(StreamHandle stream, Activations logits, std::int32_t* ids) {
  if (logits.rows == 0) return;
  if (logits.cols == 0) throw InvalidArgument("argmax: rows of 0 logits");
  const ArgmaxArguments arguments{logits.data, logits.pitch, ids,
                                  static_cast<unsigned>(logits.cols)};
  launch<argmax_kernel>(
      stream,
      {static_cast<unsigned>(logits.rows), 1, 1, kThreads, kThreads / kWarpSize * sizeof(Best)},
      arguments, "argmax");
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
