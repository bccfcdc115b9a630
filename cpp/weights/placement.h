// Puts rows of a file where kernels want them: converted, spread out, transposed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_memory.h"
#include "io/checkpoint.h"

namespace moerun {

// `rows` rows of `cols` elements that lie together in a file, at byte `offset` of it.
struct FileMatrix {
  const SafetensorsFile* file = nullptr;
  std::uint64_t offset = 0;
  DType dtype = DType::f32;
  std::size_t rows = 0;
  std::size_t cols = 0;

  std::size_t row_bytes() const { return cols * size_of(dtype); }
};

// Rows in memory, packed.
struct TypedRows {
  const std::byte* data = nullptr;
  DType dtype = DType::f32;
  std::size_t rows = 0;
  std::size_t cols = 0;

  std::size_t row_bytes() const { return cols * size_of(dtype); }
};

// Where rows go, and how far apart.
struct Target {
  std::byte* data = nullptr;
  std::size_t stride = 0;  // bytes
};

// The rows of `source`, read to `data`, as `dtype`: its own, or float32 (then in `memory`).
TypedRows converted(const FileMatrix& source, const std::byte* data, DType dtype,
                    HostMemory& memory);

// Row first + r goes to row r of the target.
void place_rows(const TypedRows& source, std::size_t first, std::size_t count,
                const Target& target);
// Column first + c goes to row c of the target.
void place_transposed(const TypedRows& source, std::size_t first, std::size_t count,
                      const Target& target);

}  // namespace moerun
