#include "io/checkpoint_fingerprint.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/hash.h"
#include "base/thread_pool.h"

namespace moerun {
namespace {

constexpr std::uint64_t kSampleBytes = 4096;
constexpr std::uint64_t kWholeBytes = std::uint64_t{64} << 10;  // up to this, all is read
constexpr std::uint64_t kSpacing = std::uint64_t{2} << 20;      // at most, between two samples
constexpr std::uint64_t kSamplesOfMatrix = 3;
// Reads wait for the disk: more threads than cores, but none for a checkpoint that is small.
constexpr std::size_t kMaxThreads = 8;
constexpr std::size_t kTensorsOfThread = 256;

// How many samples cover a tensor: a fused tensor holds a matrix for each expert.
std::uint64_t num_samples(const TensorInfo& info) {
  std::uint64_t matrices = 1;
  for (std::size_t i = 0; i + 2 < info.shape.size(); ++i) matrices *= info.shape[i];
  return std::max(kSamplesOfMatrix * std::min(matrices, info.bytes),
                  info.bytes / kSpacing + kSamplesOfMatrix);
}

std::uint64_t hash_of(const TensorRef& tensor) {
  const TensorInfo& info = *tensor.info;
  std::array<std::byte, kSampleBytes> buffer;
  Fnv1a hash;
  const auto add = [&](std::uint64_t offset, std::uint64_t bytes) {
    const Bytes sample(buffer.data(), static_cast<std::size_t>(bytes));
    tensor.file->read_at(info.offset + offset, sample);
    hash.add(ConstBytes(sample));
  };
  const std::uint64_t samples = num_samples(info);
  if (info.bytes <= kWholeBytes || samples >= info.bytes / kSampleBytes) {
    for (std::uint64_t at = 0; at < info.bytes; at += kSampleBytes) {
      add(at, std::min(kSampleBytes, info.bytes - at));
    }
    return hash.value();
  }
  const std::uint64_t last = info.bytes - kSampleBytes;
  const std::uint64_t step = last / (samples - 1);
  for (std::uint64_t i = 0; i + 1 < samples; ++i) add(i * step, kSampleBytes);
  add(last, kSampleBytes);
  return hash.value();
}

// Around a small read the system would read far ahead; loading wants that again.
void advise(const Checkpoint& checkpoint, [[maybe_unused]] bool is_sampling) {
#if defined(POSIX_FADV_RANDOM)
  for (const SafetensorsFile& file : checkpoint.files()) {
    ::posix_fadvise(file.file().get(), 0, 0, is_sampling ? POSIX_FADV_RANDOM : POSIX_FADV_NORMAL);
  }
#endif
}

}  // namespace

CheckpointFingerprint fingerprint_of(const Checkpoint& checkpoint) {
  const std::vector<std::string> names = checkpoint.names();
  std::vector<std::uint64_t> hashes(names.size());
  const std::size_t threads =
      std::clamp(names.size() / kTensorsOfThread, std::size_t{1}, kMaxThreads);
  advise(checkpoint, /*is_sampling=*/true);
  ThreadPool pool(static_cast<int>(threads));
  pool.parallel_for(names.size(),
                    [&](std::size_t i, int) { hashes[i] = hash_of(*checkpoint.find(names[i])); });
  advise(checkpoint, /*is_sampling=*/false);
  for (const SafetensorsFile& file : checkpoint.files()) file.file().check_unchanged();

  Fnv1a headers;
  Fnv1a contents;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const TensorInfo& info = *checkpoint.find(names[i])->info;
    headers.add(std::string_view(names[i]));
    headers.add(std::string_view(info.dtype_name));
    headers.add(std::uint64_t{info.shape.size()});
    for (const std::uint64_t extent : info.shape) headers.add(extent);
    contents.add(hashes[i]);
  }
  contents.add(headers.value());
  return {headers.text(), contents.text()};
}

}  // namespace moerun
