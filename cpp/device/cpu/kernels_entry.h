// The functions of a kernel set as kernel_table.h wants them. Included like kernels_dot.h, last.

void dot_entry(DType dtype, const std::byte* rows, std::size_t row_stride, std::size_t num_rows,
               std::size_t k, const float* const* xs, float* const* outs, std::size_t num_tokens,
               std::byte* scratch) {
  auto& typed_scratch = *reinterpret_cast<DotScratch*>(scratch);
  switch (dtype) {
    case DType::f32:
      return dot_typed<float>(rows, row_stride, num_rows, k, xs, outs, num_tokens, typed_scratch);
    case DType::f16:
      return dot_typed<Half>(rows, row_stride, num_rows, k, xs, outs, num_tokens, typed_scratch);
    case DType::bf16:
      return dot_typed<BFloat>(rows, row_stride, num_rows, k, xs, outs, num_tokens, typed_scratch);
  }
}

void segment_quantum_entry(DType dtype, const std::byte* records, std::size_t num_records,
                           std::size_t hidden, const float* const* xs, float* const* ys,
                           std::size_t num_tokens, bool accumulate, bool more_follows,
                           std::byte* scratch) {
  switch (dtype) {
    case DType::f32:
      return segment_quantum_typed<float>(records, num_records, hidden, xs, ys, num_tokens,
                                          accumulate, more_follows, scratch);
    case DType::f16:
      return segment_quantum_typed<Half>(records, num_records, hidden, xs, ys, num_tokens,
                                         accumulate, more_follows, scratch);
    case DType::bf16:
      return segment_quantum_typed<BFloat>(records, num_records, hidden, xs, ys, num_tokens,
                                           accumulate, more_follows, scratch);
  }
}

void weighted_sum_entry(const float* rows, std::size_t row_stride_floats, std::size_t num_rows,
                        std::size_t n, const float* const* weights, float* const* outs,
                        std::size_t num_tokens) {
  sum_rows(rows, row_stride_floats, num_rows, n, weights, outs, num_tokens, /*accumulate=*/false);
}

static_assert(sizeof(SegmentScratch) <= kKernelScratchBytes);

constexpr CpuKernels make_kernels(std::string_view name) {
  return {name,           dot_entry,    segment_quantum_entry, weighted_sum_entry,
          softmax_row,    rms_norm_row, layer_norm_row,        scale_row,
          read_all_floats};
}
