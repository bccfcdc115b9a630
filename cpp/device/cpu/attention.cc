// Attention on the CPU: rotary embedding into the KV cache, and causal softmax attention.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/finite.h"
#include "device/cpu/cpu_backend.h"

namespace moerun {
namespace {

// Query rows computed together, so that a key or value row is read once for all of them.
constexpr std::size_t kQueryRows = 12;

// A sine and a cosine take about as long as so many multiply-adds.
constexpr std::size_t kProductsPerAngle = 2048;

// Infinities become NaN: one in a key could give a score of minus infinity, which is a weight of
// zero.
void rotate(float* head, const float* cosines, const float* sines, std::size_t half) {
  for (std::size_t i = 0; i < half; ++i) {
    const float a = head[i];
    const float b = head[i + half];
    head[i] = nan_unless_finite(a * cosines[i] - b * sines[i]);
    head[i + half] = nan_unless_finite(b * cosines[i] + a * sines[i]);
  }
}

void clamp_all(float* x, std::size_t n, float limit) {
  for (std::size_t i = 0; i < n; ++i) x[i] = std::clamp(nan_unless_finite(x[i]), -limit, limit);
}

// How queries are cut into blocks that share a KV head: `group` heads of a few tokens, or some of
// the heads of one token. Which rows share a block changes no result.
struct Blocks {
  explicit Blocks(const AttentionShape& shape)
      : num_kv_heads(shape.num_kv_heads),
        group(shape.num_heads / shape.num_kv_heads),
        heads(std::min(group, kQueryRows)),
        tokens(kQueryRows / heads),
        head_blocks((group + heads - 1) / heads) {}

  std::size_t token_blocks(std::size_t num_tokens) const {
    return (num_tokens + tokens - 1) / tokens;
  }
  std::size_t count(std::size_t num_tokens) const {
    return token_blocks(num_tokens) * num_kv_heads * head_blocks;
  }

  std::size_t num_kv_heads;
  std::size_t group;   // heads that share a KV head
  std::size_t heads;   // of a block
  std::size_t tokens;  // of a block
  std::size_t head_blocks;
};

std::size_t first_key(const AttentionParams& params, std::size_t position) {
  const std::size_t end = position + 1;
  return params.window != 0 && end > params.window ? end - params.window : 0;
}

// Keys of the last row.
std::size_t num_keys(const AttentionParams& params, const SequenceRows& sequence) {
  const std::size_t end = sequence.first_position + sequence.num_rows;
  return end == 0 ? 0 : end - first_key(params, end - 1);
}

LoopWork attention_work(const AttentionShape& shape, const AttentionParams& params,
                        std::span<const SequenceRows> sequences) {
  LoopWork work;
  for (const SequenceRows& each : sequences) {
    const std::size_t elements = num_keys(params, each) * shape.head_dim;  // of a head's keys
    work.bytes += 2 * sizeof(float) * elements * shape.num_kv_heads;
    work.multiply_adds += 2 * elements * shape.num_heads * each.num_rows;
  }
  return work;
}

}  // namespace

void CpuBackend::rotate_and_store(Stream& stream, const AttentionShape& shape,
                                  const RotaryParams& rotary, Position first, Activations qkv,
                                  const KvLayer& kv) {
  const SequenceRows all{qkv.rows, first.value, kv};
  rotate_and_store_batch(stream, shape, rotary, {&all, 1}, qkv);
}

void CpuBackend::rotate_and_store_batch(Stream& stream, const AttentionShape& shape,
                                        const RotaryParams& rotary,
                                        std::span<const SequenceRows> sequences, Activations qkv) {
  check_sequences("rotate_and_store", sequences, qkv);
  auto& own = static_cast<CpuStream&>(stream);
  SequenceItems& items = own.sequence_items();
  items.list(
      sequences, [](const SequenceRows& each) { return each.num_rows; },
      [](const SequenceRows&) { return std::size_t{1}; });
  const LoopWork work{.multiply_adds = items.size() * (shape.head_dim / 2 * kProductsPerAngle +
                                                       4 * shape.head_dim *
                                                           (shape.num_heads + shape.num_kv_heads))};
  pool_.parallel_for(items.size(), work, [&](std::size_t number, int worker) {
    const SequenceItems::Item item = items.at(number);
    rotate_row(own, worker, shape, rotary, item.sequence->first_position + item.number,
               qkv.row(item.first_row + item.number), item.sequence->kv);
  });
}

void CpuBackend::rotate_row(CpuStream& stream, int worker, const AttentionShape& shape,
                            const RotaryParams& rotary, std::size_t position, float* q,
                            const KvLayer& kv) {
  const std::size_t dim = shape.head_dim;
  const std::size_t half = dim / 2;
  const std::size_t q_size = shape.num_heads * dim;
  const std::size_t kv_size = shape.num_kv_heads * dim;
  // Norms want rows whose padding is zero; heads lie packed in qkv, so they are copied out.
  const std::size_t room = padded(std::max(q_size, kv_size));
  float* row = stream.worker_floats(worker, 2 * room + 2 * half);
  float* normed = row + room;
  float* cosines = normed + room;
  float* sines = cosines + half;
  float* k = q + q_size;
  float* v = k + kv_size;
  const auto normalise = [&](const NormWeights& weights, float* x, std::size_t n) {
    std::fill(std::copy(x, x + n, row), row + padded(n), 0.0f);
    kernels_.rms_norm(row, weights.weight, weights.eps, normed, n);
    std::copy(normed, normed + n, x);
  };
  if (rotary.q_norm.weight != nullptr && rotary.norm_per_head) {
    for (std::size_t h = 0; h < shape.num_heads; ++h) normalise(rotary.q_norm, q + h * dim, dim);
    for (std::size_t h = 0; h < shape.num_kv_heads; ++h) {
      normalise(rotary.k_norm, k + h * dim, dim);
    }
  } else if (rotary.q_norm.weight != nullptr) {
    normalise(rotary.q_norm, q, q_size);
    normalise(rotary.k_norm, k, kv_size);
  }

  if (rotary.clip > 0) clamp_all(q, q_size + 2 * kv_size, rotary.clip);

  for (std::size_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * rotary.inv_freq[i];
    cosines[i] = std::cos(angle) * rotary.scale;
    sines[i] = std::sin(angle) * rotary.scale;
  }
  for (std::size_t h = 0; h < shape.num_heads; ++h) rotate(q + h * dim, cosines, sines, half);
  for (std::size_t h = 0; h < shape.num_kv_heads; ++h) {
    rotate(k + h * dim, cosines, sines, half);
    const std::size_t offset = (h * kv.capacity + position) * kv.pitch;
    std::copy(k + h * dim, k + (h + 1) * dim, kv.keys + offset);
    std::copy(v + h * dim, v + (h + 1) * dim, kv.values + offset);
  }
}

void CpuBackend::attention(Stream& stream, const AttentionShape& shape,
                           const AttentionParams& params, Position first, Activations qkv,
                           const KvLayer& kv, Activations out) {
  const SequenceRows all{qkv.rows, first.value, kv};
  attention_batch(stream, shape, params, {&all, 1}, qkv, out);
}

void CpuBackend::attention_batch(Stream& stream, const AttentionShape& shape,
                                 const AttentionParams& params,
                                 std::span<const SequenceRows> sequences, Activations qkv,
                                 Activations out) {
  check_sequences("attention", sequences, qkv);
  auto& own = static_cast<CpuStream&>(stream);
  const Blocks blocks(shape);
  SequenceItems& items = own.sequence_items();
  items.list(
      sequences, [&](const SequenceRows& each) { return blocks.count(each.num_rows); },
      [&](const SequenceRows& each) { return num_keys(params, each); });
  pool_.parallel_for(
      items.size(), attention_work(shape, params, sequences), [&](std::size_t number, int worker) {
        const auto& [sequence, first_row, block] = items.at(number);
        const std::size_t kv_head = block / blocks.head_blocks % blocks.num_kv_heads;
        const std::size_t first_head =
            kv_head * blocks.group + block % blocks.head_blocks * blocks.heads;
        // The last tokens first: they have the most keys.
        const std::size_t token_block = blocks.token_blocks(sequence->num_rows) - 1 -
                                        block / blocks.head_blocks / blocks.num_kv_heads;
        const std::size_t first_token = token_block * blocks.tokens;
        attend(own, worker, shape, params, *sequence,
               {.kv_head = kv_head,
                .first_head = first_head,
                .last_head = std::min((kv_head + 1) * blocks.group, first_head + blocks.heads),
                .first_token = first_token,
                .last_token = std::min(sequence->num_rows, first_token + blocks.tokens)},
               qkv.slice(first_row, sequence->num_rows), out.slice(first_row, sequence->num_rows));
      });
}

void CpuBackend::attend(CpuStream& stream, int worker, const AttentionShape& shape,
                        const AttentionParams& params, const SequenceRows& sequence,
                        const QueryBlock& block, Activations qkv, Activations out) {
  const std::size_t dim = shape.head_dim;
  const KvLayer& kv = sequence.kv;
  const std::size_t first = sequence.first_position;
  const std::size_t key_begin = first_key(params, first + block.first_token);
  const std::size_t key_end = first + block.last_token;  // of the last token
  const std::size_t keys_read = key_end - key_begin;
  const std::size_t score_pitch = padded(keys_read) + kRowQuantum;

  float* queries = stream.worker_floats(worker, kQueryRows * (2 * kv.pitch + score_pitch));
  float* results = queries + kQueryRows * kv.pitch;
  float* scores = results + kQueryRows * kv.pitch;
  const float* xs[kQueryRows];
  const float* probabilities[kQueryRows];
  float* score_rows[kQueryRows];
  float* result_rows[kQueryRows];
  std::size_t num_rows = 0;
  for (std::size_t t = block.first_token; t < block.last_token; ++t) {
    for (std::size_t h = block.first_head; h < block.last_head; ++h, ++num_rows) {
      float* query = queries + num_rows * kv.pitch;
      const float* q = qkv.row(t) + h * dim;
      std::fill(std::copy(q, q + dim, query), query + kv.pitch, 0.0f);
      xs[num_rows] = query;
      score_rows[num_rows] = scores + num_rows * score_pitch;
      probabilities[num_rows] = score_rows[num_rows];
      result_rows[num_rows] = results + num_rows * kv.pitch;
    }
  }
  const float* keys = kv.keys + (block.kv_head * kv.capacity + key_begin) * kv.pitch;
  const float* values = kv.values + (block.kv_head * kv.capacity + key_begin) * kv.pitch;
  kernels_.dot(DType::f32, reinterpret_cast<const std::byte*>(keys), kv.pitch * sizeof(float),
               keys_read, kv.pitch, xs, score_rows, num_rows, stream.kernel_scratch(worker));
  std::size_t row = 0;
  for (std::size_t t = block.first_token; t < block.last_token; ++t) {
    const std::size_t begin = first_key(params, first + t) - key_begin;
    const std::size_t end = first + t + 1 - key_begin;
    for (std::size_t h = block.first_head; h < block.last_head; ++h, ++row) {
      std::fill(score_rows[row], score_rows[row] + begin, 0.0f);
      kernels_.softmax(score_rows[row] + begin, end - begin, params.scale);
      std::fill(score_rows[row] + end, score_rows[row] + keys_read, 0.0f);
    }
  }
  kernels_.weighted_sum(values, kv.pitch, keys_read, kv.pitch, probabilities, result_rows,
                        num_rows);
  row = 0;
  for (std::size_t t = block.first_token; t < block.last_token; ++t) {
    for (std::size_t h = block.first_head; h < block.last_head; ++h, ++row) {
      std::copy(result_rows[row], result_rows[row] + dim, out.row(t) + h * dim);
    }
  }
}

}  // namespace moerun
