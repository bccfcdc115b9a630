#include "weights/placement.h"

#include <cstring>

#include "weights/transpose.h"

namespace moerun {
namespace {

void convert_to_float(DType dtype, const std::byte* source, float* target, std::size_t n) {
  if (dtype == DType::f32) {
    std::memcpy(target, source, n * sizeof(float));
    return;
  }
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t bits;  // a file may put its tensors anywhere
    std::memcpy(&bits, source + i * sizeof(bits), sizeof(bits));
    target[i] = dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
  }
}

}  // namespace

TypedRows converted(const FileMatrix& source, const std::byte* data, DType dtype,
                    HostMemory& memory) {
  if (source.dtype == dtype) return {data, dtype, source.rows, source.cols};
  const std::size_t count = source.rows * source.cols;
  const std::size_t needed = count * sizeof(float);
  if (memory.size() < needed) memory = HostMemory(needed, "converting weights");
  convert_to_float(source.dtype, data, memory.as<float>(), count);
  return {memory.data(), DType::f32, source.rows, source.cols};
}

void place_rows(const TypedRows& source, std::size_t first, std::size_t count,
                const Target& target) {
  const std::size_t bytes = source.row_bytes();
  for (std::size_t row = 0; row < count; ++row) {
    std::memcpy(target.data + row * target.stride, source.data + (first + row) * bytes, bytes);
  }
}

void place_transposed(const TypedRows& source, std::size_t first, std::size_t count,
                      const Target& target) {
  const std::size_t element_bytes = size_of(source.dtype);
  transpose(source.data + first * element_bytes, source.row_bytes(), source.rows, count,
            target.data, target.stride, element_bytes);
}

}  // namespace moerun
