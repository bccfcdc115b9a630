#include "weights/tensor_contents.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/dtype.h"

namespace moerun {
namespace {

constexpr std::uint64_t kBlockBytes = std::uint64_t{1} << 20;

void read_block(const TensorRef& tensor, std::uint64_t begin, std::vector<std::byte>& block) {
  tensor.file->read_at(tensor.info->offset + begin, block);
}

float element_at(DType dtype, const std::byte* data, std::uint64_t index) {
  if (dtype == DType::f32) {
    float value = 0;
    std::memcpy(&value, data + index * sizeof(value), sizeof(value));
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, data + index * sizeof(bits), sizeof(bits));
  return dtype == DType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
}

}  // namespace

bool is_same_data(const TensorRef& a, const TensorRef& b) {
  if (a.info->bytes != b.info->bytes || a.info->dtype_name != b.info->dtype_name) return false;
  std::vector<std::byte> of_a;
  std::vector<std::byte> of_b;
  for (std::uint64_t begin = 0; begin < a.info->bytes; begin += kBlockBytes) {
    of_a.resize(std::min(kBlockBytes, a.info->bytes - begin));
    of_b.resize(of_a.size());
    read_block(a, begin, of_a);
    read_block(b, begin, of_b);
    if (of_a != of_b) return false;
  }
  return true;
}

std::optional<NonFinite> find_non_finite(const TensorRef& tensor) {
  if (!tensor.info->dtype) return std::nullopt;
  return find_non_finite(tensor, 0, tensor.info->bytes / size_of(*tensor.info->dtype));
}

std::optional<NonFinite> find_non_finite(const TensorRef& tensor, std::uint64_t first,
                                         std::uint64_t count) {
  if (!tensor.info->dtype) return std::nullopt;
  const DType dtype = *tensor.info->dtype;
  const std::uint64_t block_elements = kBlockBytes / size_of(dtype);
  std::vector<std::byte> block;
  for (std::uint64_t done = 0; done < count; done += block_elements) {
    const std::uint64_t elements = std::min(block_elements, count - done);
    block.resize(elements * size_of(dtype));
    read_block(tensor, (first + done) * size_of(dtype), block);
    for (std::uint64_t i = 0; i < elements; ++i) {
      const float value = element_at(dtype, block.data(), i);
      if (!std::isfinite(value)) return NonFinite{first + done + i, value};
    }
  }
  return std::nullopt;
}

}  // namespace moerun
