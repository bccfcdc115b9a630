#include "kernels/rope.h"

#include "base/error.h"
#include "kernels/sequence_list.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 1024;
// Pairs whose loads a thread has under way at once: in one go for up to 48 heads of 128.
constexpr unsigned kPairsAhead = 3;

struct RotateArguments {
  float* qkv;  // (tokens, (num_heads + 2 num_kv_heads) * head_dim)
  std::size_t pitch;
  float* keys;    // (num_kv_heads, capacity, kv_pitch)
  float* values;  // the same
  std::size_t capacity;
  std::size_t kv_pitch;
  std::size_t first_position;
  const std::int32_t* position_on_device;  // in its place, or null
  const float* inv_freq;                   // (head_dim / 2)
  float scale;
  const float* q_weight;  // (head_dim) or (num_heads * head_dim)?
  const float* k_weight;
  float q_eps;
  float k_eps;
  bool norm_per_head;
  float clip;
  unsigned num_heads;
  unsigned num_kv_heads;
  unsigned head_dim;
};

// The next token of each of several sequences.
struct RotateEachArguments {
  RotateArguments all;  // but for keys, values, capacity and first_position
  SequenceList sequences;
};

MOERUN_DEVICE float clamp_to(float number, float limit) {
  const float x = nan_unless_finite(number);
  return x < -limit ? -limit : limit < x ? limit : x;
}

MOERUN_DEVICE float inverse_rms(float squares, float n, float eps) {
  return 1.0f / sqrtf(squares / n + eps);
}

// What q and k are multiplied by, besides their weights: inverses[h] for the heads of q, then of k.
MOERUN_DEVICE void find_inverses(const RotateArguments& a, const float* row, float* inverses,
                                 float* warp_sums) {
  const unsigned num_rotated = a.num_heads + a.num_kv_heads;
  if (a.norm_per_head) {
    for (unsigned h = warp(); h < num_rotated; h += num_warps()) {
      float squares = 0;
      for (unsigned i = lane(); i < a.head_dim; i += kWarpSize) {
        const float x = row[h * a.head_dim + i];
        squares = fused_multiply_add(x, x, squares);
      }
      squares = sum_over_warp(squares);
      const float eps = h < a.num_heads ? a.q_eps : a.k_eps;
      if (lane() == 0) inverses[h] = inverse_rms(squares, static_cast<float>(a.head_dim), eps);
    }
    return;
  }
  const unsigned q_size = a.num_heads * a.head_dim;
  const unsigned k_size = a.num_kv_heads * a.head_dim;
  float q_squares = 0;
  for (unsigned i = thread_x(); i < q_size; i += kThreads) {
    q_squares = fused_multiply_add(row[i], row[i], q_squares);
  }
  float k_squares = 0;
  for (unsigned i = thread_x(); i < k_size; i += kThreads) {
    k_squares = fused_multiply_add(row[q_size + i], row[q_size + i], k_squares);
  }
  q_squares = sum_over_block(q_squares, warp_sums);
  k_squares = sum_over_block(k_squares, warp_sums + num_warps());
  for (unsigned h = thread_x(); h < num_rotated; h += kThreads) {
    inverses[h] = h < a.num_heads ? inverse_rms(q_squares, static_cast<float>(q_size), a.q_eps)
                                  : inverse_rms(k_squares, static_cast<float>(k_size), a.k_eps);
  }
}

// Elements i and i + head_dim / 2 of a head of q or k.
struct Pair {
  float low;
  float high;
};

// Of the heads of q, then of k, normalised and clamped.
MOERUN_DEVICE Pair load_pair(const RotateArguments& a, const float* row, const float* inverses,
                             unsigned number) {
  const unsigned half = a.head_dim / 2;
  const unsigned head = number / half;
  const unsigned i = number % half;
  Pair pair{row[head * a.head_dim + i], row[head * a.head_dim + i + half]};
  if (a.q_weight != nullptr) {
    const bool is_query = head < a.num_heads;
    const unsigned weight_head = a.norm_per_head ? 0 : is_query ? head : head - a.num_heads;
    const float* weight = (is_query ? a.q_weight : a.k_weight) + weight_head * a.head_dim;
    pair.low = weight[i] * (pair.low * inverses[head]);
    pair.high = weight[i + half] * (pair.high * inverses[head]);
  }
  if (a.clip > 0) return {clamp_to(pair.low, a.clip), clamp_to(pair.high, a.clip)};
  return pair;
}

// An infinite key could give a score of minus infinity, which is a weight of zero: so the numbers
// that come here are NaN instead.
MOERUN_DEVICE void store_pair(const RotateArguments& a, const SequenceEntry& sequence, float* row,
                              std::size_t position, unsigned number, const Pair& pair) {
  const unsigned half = a.head_dim / 2;
  const unsigned head = number / half;
  const unsigned i = number % half;
  row[head * a.head_dim + i] = pair.low;
  row[head * a.head_dim + i + half] = pair.high;
  if (head < a.num_heads) return;
  float* key =
      sequence.keys + (std::size_t{head - a.num_heads} * sequence.capacity + position) * a.kv_pitch;
  key[i] = pair.low;
  key[i + half] = pair.high;
}

// `sequence` takes the place of what `a` says of keys and values: copied into it, it would cost
// local memory on some architectures.
//
// A block does all heads of one token; a thread takes pairs of elements that are rotated together.
// Shared memory: cosines and sines, a factor for each head of q and k, two floats a warp.
// Preconditions: head_dim even; position below the KV cache's capacity.
MOERUN_DEVICE void rotate_row(const RotateArguments& a, const SequenceEntry& sequence, float* row,
                              std::size_t position) {
  const unsigned half = a.head_dim / 2;
  const unsigned num_rotated = a.num_heads + a.num_kv_heads;
  auto* cosines = shared_memory<float>();
  float* sines = cosines + half;
  float* inverses = sines + half;
  float* warp_sums = inverses + num_rotated;

  for (unsigned i = thread_x(); i < half; i += kThreads) {
    const float angle = static_cast<float>(position) * a.inv_freq[i];
    cosines[i] = cosf(angle) * a.scale;
    sines[i] = sinf(angle) * a.scale;
  }
  if (a.q_weight != nullptr) find_inverses(a, row, inverses, warp_sums);
  sync_block();

  const unsigned num_pairs = num_rotated * half;
  for (unsigned first = thread_x(); first < num_pairs; first += kPairsAhead * kThreads) {
    Pair pairs[kPairsAhead];
    MOERUN_UNROLL
    for (unsigned j = 0; j < kPairsAhead; ++j) {
      const unsigned number = first + j * kThreads;
      if (number < num_pairs) pairs[j] = load_pair(a, row, inverses, number);
    }
    MOERUN_UNROLL
    for (unsigned j = 0; j < kPairsAhead; ++j) {
      const unsigned number = first + j * kThreads;
      if (number >= num_pairs) continue;
      const float cosine = cosines[number % half];
      const float sine = sines[number % half];
      store_pair(a, sequence, row, position, number,
                 {nan_unless_finite(pairs[j].low * cosine - pairs[j].high * sine),
                  nan_unless_finite(pairs[j].high * cosine + pairs[j].low * sine)});
    }
  }
  float* v = row + num_rotated * a.head_dim;
  for (unsigned i = thread_x(); i < a.num_kv_heads * a.head_dim; i += kThreads) {
    const float value = a.clip > 0 ? clamp_to(v[i], a.clip) : v[i];
    v[i] = value;
    const std::size_t target = std::size_t{i / a.head_dim} * sequence.capacity + position;
    sequence.values[target * a.kv_pitch + i % a.head_dim] = value;
  }
}

MOERUN_KERNEL MOERUN_BOUNDS(kThreads, 1) rotate_kernel(RotateArguments a) {
  const std::size_t first_position = a.position_on_device != nullptr
                                         ? static_cast<std::size_t>(*a.position_on_device)
                                         : a.first_position;
  rotate_row(a, {a.keys, a.values, static_cast<std::uint32_t>(a.capacity), 0},
             a.qkv + block_x() * a.pitch, first_position + block_x());
}

MOERUN_KERNEL MOERUN_BOUNDS(kThreads, 1)
    rotate_each_kernel(const MOERUN_IN_PLACE RotateEachArguments arguments) {
  const SequenceEntry& sequence = arguments.sequences.entries[block_x()];
  const RotateArguments& a = arguments.all;
  rotate_row(a, sequence, a.qkv + block_x() * a.pitch, sequence.position);
}

RotateArguments arguments_of(const AttentionShape& shape, const RotaryParams& rotary,
                             Position first_position, std::size_t tokens, const Activations& qkv,
                             const KvLayer& kv) {
  const std::size_t expected = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  if (shape.head_dim % 2 != 0 || qkv.cols != expected || kv.pitch < shape.head_dim) {
    throw InvalidArgument(message("rotate_and_store: heads of ", shape.head_dim, " in rows of ",
                                  qkv.cols, " and a KV cache with a pitch of ", kv.pitch,
                                  "; expected an even number, ", expected, " and no less"));
  }
  if (first_position.value + tokens > kv.capacity) {
    throw InvalidArgument(message("rotate_and_store: position ", first_position.value + tokens - 1,
                                  " in a KV cache of ", kv.capacity, " tokens"));
  }
  return {
      .qkv = qkv.data,
      .pitch = qkv.pitch,
      .keys = kv.keys,
      .values = kv.values,
      .capacity = kv.capacity,
      .kv_pitch = kv.pitch,
      .first_position = first_position.value,
      .position_on_device = first_position.on_device,
      .inv_freq = rotary.inv_freq,
      .scale = rotary.scale,
      .q_weight = rotary.q_norm.weight,
      .k_weight = rotary.k_norm.weight,
      .q_eps = rotary.q_norm.eps,
      .k_eps = rotary.k_norm.eps,
      .norm_per_head = rotary.norm_per_head,
      .clip = rotary.clip,
      .num_heads = static_cast<unsigned>(shape.num_heads),
      .num_kv_heads = static_cast<unsigned>(shape.num_kv_heads),
      .head_dim = static_cast<unsigned>(shape.head_dim),
  };
}

LaunchShape launch_shape(const AttentionShape& shape, std::size_t rows) {
  const std::size_t shared =
      shape.head_dim + shape.num_heads + shape.num_kv_heads + 2 * kThreads / kWarpSize;
  return {static_cast<unsigned>(rows), 1, 1, kThreads, shared * sizeof(float)};
}

}  // namespace

void rotate_and_store(StreamHandle stream, const AttentionShape& shape, const RotaryParams& rotary,
                      Position first_position, Activations qkv, const KvLayer& kv) {
  if (qkv.rows == 0) return;
  launch<rotate_kernel>(stream, launch_shape(shape, qkv.rows),
                        arguments_of(shape, rotary, first_position, qkv.rows, qkv, kv),
                        "rotate_and_store");
}

void rotate_and_store_each(StreamHandle stream, const AttentionShape& shape,
                           const RotaryParams& rotary, std::span<const SequenceRows> sequences,
                           Activations qkv) {
  if (sequences.empty()) return;
  check_list(sequences, qkv, "rotate_and_store");
  RotateEachArguments arguments{};
  for (const SequenceRows& each : sequences) {
    arguments.all = arguments_of(shape, rotary, each.first_position, 1, qkv, each.kv);
  }
  arguments.sequences = list_of(sequences);
  launch<rotate_each_kernel>(stream, launch_shape(shape, qkv.rows), arguments, "rotate_and_store");
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
