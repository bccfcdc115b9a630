#include "kernels/norm.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kMaxThreads = 1024;
// Elements that a thread holds: their loads are all under way at once. Few for the usual sizes,
// many for any other.
constexpr unsigned kFew = 4;
constexpr unsigned kMany = 8;

struct NormArguments {
  const float* delta;  // (tokens, cols)?
  std::size_t delta_pitch;
  float* x;  // (tokens, cols), written only where there is a delta
  std::size_t x_pitch;
  float* out;  // (tokens, cols)
  std::size_t out_pitch;
  const float* weight;  // (cols)
  const float* bias;    // (cols)?
  float eps;
  unsigned cols;
};

// A block computes the row of one token; a thread holds every num_threads()-th element.
// Shared memory: two floats a warp.
// Preconditions: cols <= kElements num_threads(); no rows overlap, except that out may be x.
template <NormKind kKind, unsigned kElements>
MOERUN_KERNEL MOERUN_BOUNDS(kMaxThreads, 1) norm_kernel(NormArguments a) {
  auto* warp_sums = shared_memory<float>();
  float* x = a.x + block_x() * a.x_pitch;
  float* out = a.out + block_x() * a.out_pitch;
  // With many elements blocks are full, and a constant stride saves the registers of addresses.
  const unsigned stride = kElements == kMany ? kMaxThreads : num_threads();
  const auto col_of = [&](unsigned i) { return i * stride + thread_x(); };
  // Behind the row's end zeros, which are not counted below.
  const auto load = [&](const float* row, float (&values)[kElements]) {
    MOERUN_UNROLL
    for (unsigned i = 0; i < kElements; ++i) values[i] = col_of(i) < a.cols ? row[col_of(i)] : 0.0f;
  };
  float values[kElements];
  float weights[kElements];
  float biases[kElements] = {};
  load(x, values);
  load(a.weight, weights);
  if (a.bias != nullptr) load(a.bias, biases);
  if (a.delta != nullptr) {
    float delta[kElements];
    load(a.delta + block_x() * a.delta_pitch, delta);
    MOERUN_UNROLL
    for (unsigned i = 0; i < kElements; ++i) {
      values[i] += delta[i];
      if (col_of(i) < a.cols) x[col_of(i)] = values[i];
    }
  }
  const auto n = static_cast<float>(a.cols);
  if constexpr (kKind == NormKind::layer) {
    float sum = 0;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kElements; ++i) sum += values[i];
    const float mean = sum_over_block(sum, warp_sums) / n;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kElements; ++i) values[i] = col_of(i) < a.cols ? values[i] - mean : 0;
    warp_sums += num_warps();
  }
  float squares = 0;
  MOERUN_UNROLL
  for (unsigned i = 0; i < kElements; ++i) {
    squares = fused_multiply_add(values[i], values[i], squares);
  }
  const float inverse = 1.0f / sqrtf(sum_over_block(squares, warp_sums) / n + a.eps);
  MOERUN_UNROLL
  for (unsigned i = 0; i < kElements; ++i) {
    if (col_of(i) < a.cols) out[col_of(i)] = values[i] * inverse * weights[i] + biases[i];
  }
}

template <NormKind kKind>
void launch_kind(StreamHandle stream, std::size_t tokens, const NormArguments& arguments,
                 const char* name) {
  const unsigned warps = (arguments.cols + kFew * kWarpSize - 1) / (kFew * kWarpSize);
  const unsigned threads = std::min(kMaxThreads, warps * kWarpSize);
  const LaunchShape shape{static_cast<unsigned>(tokens), 1, 1, threads,
                          2 * threads / kWarpSize * sizeof(float)};
  if (arguments.cols <= kFew * threads) {
    launch<norm_kernel<kKind, kFew>>(stream, shape, arguments, name);
  } else {
    launch<norm_kernel<kKind, kMany>>(stream, shape, arguments, name);
  }
}

void launch_norm(StreamHandle stream, const NormWeights& weights, Activations delta, Activations x,
                 Activations out) {
  if (x.rows == 0) return;
  if (out.cols != x.cols || (delta.data != nullptr && delta.cols != x.cols)) {
    throw InvalidArgument(message("norm: rows of ", x.cols, " and of ",
                                  out.cols != x.cols ? out.cols : delta.cols, " numbers"));
  }
  if (x.cols > kMany * kMaxThreads) {
    throw InvalidArgument(message("norm: rows of ", x.cols, " numbers; the CUDA kernels take ",
                                  kMany * kMaxThreads, " at most"));
  }
  const NormArguments arguments{
      delta.data,     delta.pitch,
      x.data,         x.pitch,
      out.data,       out.pitch,
      weights.weight, weights.kind == NormKind::layer ? weights.bias : nullptr,
      weights.eps,    static_cast<unsigned>(x.cols)};
  if (weights.kind == NormKind::rms) {
    launch_kind<NormKind::rms>(stream, x.rows, arguments, "rms_norm");
  } else {
    launch_kind<NormKind::layer>(stream, x.rows, arguments, "layer_norm");
  }
}

}  // namespace

void norm(StreamHandle stream, const NormWeights& weights, Activations x, Activations out) {
  launch_norm(stream, weights, {}, x, out);
}

void add_norm(StreamHandle stream, const NormWeights& weights, Activations delta, Activations x,
              Activations out) {
  launch_norm(stream, weights, delta, x, out);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
