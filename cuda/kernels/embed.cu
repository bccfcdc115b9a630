#include "kernels/embed.h"

#include "kernels/dtype_dispatch.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 256;

struct EmbedArguments {
  const std::byte* table;
  std::size_t row_bytes;
  const std::int32_t* token_ids;  // (tokens)
  float scale;
  float* out;  // (tokens, cols)
  std::size_t out_pitch;
  unsigned cols;
};

// A block writes the row of one token; a thread takes 16 bytes of the table's row at a time.
// No shared memory.
// Preconditions: rows of the table on 16-byte borders, padded to whole packs.
template <DType kDType>
MOERUN_KERNEL embed_kernel(EmbedArguments a) {
  constexpr unsigned kWidth = kPackWeights<kDType>;
  const std::byte* row = a.table + static_cast<std::size_t>(a.token_ids[block_x()]) * a.row_bytes;
  float* out = a.out + block_x() * a.out_pitch;
  const unsigned num_packs = (a.cols + kWidth - 1) / kWidth;
  for (unsigned p = thread_x(); p < num_packs; p += num_threads()) {
    const Pack16 pack = load_once(row + std::size_t{p} * sizeof(Pack16));
    MOERUN_UNROLL
    for (unsigned i = 0; i < kWidth; ++i) {
      if (p * kWidth + i < a.cols) out[p * kWidth + i] = a.scale * weight_at<kDType>(pack, i);
    }
  }
}

}  // namespace

void embed(StreamHandle stream, const MatrixView& table, const std::int32_t* token_ids, float scale,
           Activations out) {
  if (out.rows == 0) return;
  check_weights(table, "embed");
  const EmbedArguments arguments{table.data,
                                 table.row_bytes(),
                                 token_ids,
                                 scale,
                                 out.data,
                                 out.pitch,
                                 static_cast<unsigned>(table.cols)};
  dispatch_dtype(table.dtype, [&](auto dtype) {
    launch<embed_kernel<dtype.value>>(stream, {static_cast<unsigned>(out.rows), 1, 1, kThreads},
                                      arguments, "embed");
  });
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
