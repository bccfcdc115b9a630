#include "segment_layer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <span>

#include "check.h"
#include "device/backend.h"
#include "kernels/expert_sum.h"
#include "kernels/segment_gemm.h"
#include "kernels/segment_gemv.h"
#include "on_device.h"

namespace moerun::test {
namespace {

// Memory of the device, filled from the host.
cuda::DeviceMemory copy_to_device(const TestStream& stream, const void* source, std::size_t bytes) {
  cuda::DeviceMemory memory(bytes, "a test's array");
  if (bytes != 0) {
    cuda::copy_async(stream, memory.data(), static_cast<const std::byte*>(source), bytes);
  }
  return memory;
}

struct Cut {
  std::size_t expert;
  std::size_t first_record;
  std::size_t num_records;
};

// What each launch computes.
std::vector<std::vector<Cut>> make_launches(const ExpertLayer& layer, const DeviceRun& run) {
  RandomWeights random(run.cuts);
  std::vector<Cut> all;
  for (std::size_t e = 0; e < layer.records.size(); ++e) {
    for (std::size_t first = 0; first < layer.shape.num_records(e);) {
      std::size_t count = layer.shape.num_records(e) - first;
      if (run.cuts != 0) count = std::min(count, kQuantumRecords * (1 + random.below(3)));
      all.push_back({e, first, count});
      first += count;
    }
  }
  if (run.cuts == 0) return {all};
  for (std::size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[random.below(i)]);
  if (run.is_folded) {
    // Places stay with their experts, records rise over them.
    for (std::size_t e = 0; e < layer.records.size(); ++e) {
      std::vector<Cut*> places;
      std::vector<Cut> own;
      for (Cut& cut : all) {
        if (cut.expert != e) continue;
        places.push_back(&cut);
        own.push_back(cut);
      }
      std::sort(own.begin(), own.end(),
                [](const Cut& a, const Cut& b) { return a.first_record < b.first_record; });
      for (std::size_t i = 0; i < own.size(); ++i) *places[i] = own[i];
    }
  }
  std::vector<std::vector<Cut>> launches;
  for (std::size_t done = 0; done < all.size();) {
    const std::size_t count = std::min(all.size() - done, 1 + random.below(6));
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(done);
    launches.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(count));
    done += count;
  }
  return launches;
}

// Rows with more between them than padding, which holds what must not be read.
std::vector<float> spread_out(const std::vector<float>& rows, std::size_t cols, std::size_t pitch) {
  const std::size_t count = rows.size() / padded(cols);
  std::vector<float> result(count * pitch, std::numeric_limits<float>::quiet_NaN());
  for (std::size_t r = 0; r < count; ++r) {
    std::copy_n(rows.data() + r * padded(cols), cols, result.data() + r * pitch);
  }
  return result;
}

}  // namespace

ExpertLayer make_expert_layer(const ExpertShape& shape, std::uint64_t seed) {
  RandomWeights random(seed);
  ExpertLayer layer{shape, {}};
  for (std::size_t e = 0; e <= shape.num_experts; ++e) {
    const auto values = random.matrix(3 * shape.num_records(e), shape.hidden_size);
    layer.records.push_back(encode(values, shape.dtype_of(e)));
  }
  return layer;
}

ExpertTokens make_expert_tokens(const ExpertLayer& layer, std::size_t count, std::size_t top_k,
                                std::uint64_t seed) {
  RandomWeights random(seed);
  const bool shared = layer.shape.shared_intermediate_size != 0;
  ExpertTokens tokens{
      count, top_k + (shared ? 1u : 0u), random.matrix(count, layer.shape.hidden_size), {}, {}};
  for (float& value : tokens.x) value *= 0.137f;
  for (std::size_t t = 0; t < count; ++t) {
    std::vector<std::int32_t> order(layer.shape.num_experts);
    for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<std::int32_t>(e);
    for (std::size_t s = 0; s < top_k; ++s) {
      std::swap(order[s], order[s + random.below(order.size() - s)]);
      tokens.ids.push_back(order[s]);
      tokens.weights.push_back(0.3f + 0.1f * random.value());
    }
    if (shared) {
      tokens.ids.push_back(static_cast<std::int32_t>(layer.shape.num_experts));
      tokens.weights.push_back(0.77f);
    }
  }
  return tokens;
}

ExpertTokens slice_of(const ExpertTokens& tokens, std::size_t first, std::size_t count) {
  const auto part = [&](const auto& all) {
    const auto width = static_cast<std::ptrdiff_t>(all.size() / tokens.count);
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(first) * width;
    return std::decay_t<decltype(all)>(begin, begin + static_cast<std::ptrdiff_t>(count) * width);
  };
  return {count, tokens.slots, part(tokens.x), part(tokens.ids), part(tokens.weights)};
}

std::vector<float> experts_on_cpu(const ExpertLayer& layer, ExpertTokens tokens) {
  const auto backend = make_cpu_backend(1, "portable");
  const auto stream = backend->make_stream();
  const std::size_t cols = layer.shape.hidden_size;
  const std::size_t pitch = padded(cols);
  std::vector<float> y(tokens.count * pitch, 0.25f);
  const Routing routing{tokens.ids.data(), tokens.weights.data(), tokens.count, tokens.slots};
  std::vector<Segment> segments;
  for (std::size_t e = 0; e < layer.records.size(); ++e) {
    if (layer.records[e].empty()) continue;
    segments.push_back({e, 0, layer.shape.num_records(e), layer.records[e]});
  }
  backend->begin_experts(*stream, layer.shape, {tokens.x.data(), tokens.count, cols, pitch},
                         routing);
  backend->compute_segments(*stream, segments);
  backend->finish_experts(*stream, 0.5f, {y.data(), tokens.count, cols, pitch});
  std::vector<float> result;
  for (std::size_t t = 0; t < tokens.count; ++t) {
    const auto row = y.begin() + static_cast<std::ptrdiff_t>(t * pitch);
    result.insert(result.end(), row, row + static_cast<std::ptrdiff_t>(cols));
  }
  return result;
}

std::vector<float> experts_on_device(const ExpertLayer& layer, const ExpertTokens& tokens,
                                     const DeviceRun& run) {
  const std::size_t cols = layer.shape.hidden_size;
  const std::size_t pitch = cols + 5;  // less than kernels pad rows to, often
  const std::vector<float> x = spread_out(tokens.x, cols, pitch);
  std::vector<float> y(tokens.count * pitch, 0.25f);
  TestStream stream;
  const auto copy_of = [&](const auto& all) {
    return copy_to_device(stream, all.data(), all.size() * sizeof(all[0]));
  };
  const auto device_x = copy_of(x);
  const auto device_y = copy_of(y);
  const auto ids = copy_of(tokens.ids);
  const auto weights = copy_of(tokens.weights);
  std::vector<cuda::DeviceMemory> records;
  for (const auto& expert : layer.records) records.push_back(copy_of(expert));
  const std::size_t floats =
      cuda::partial_floats(layer.shape, tokens.count, tokens.slots, run.is_folded);
  const cuda::DeviceMemory partials(floats * sizeof(float), "a test's sums");
  const cuda::ExpertWork work{
      layer.shape,
      {device_x.as<float>(), tokens.count, cols, pitch},
      {ids.as<std::int32_t>(), weights.as<float>(), tokens.count, tokens.slots},
      partials.as<float>(),
      run.is_folded};
  std::vector<cuda::DeviceMemory> scratch;
  const auto launches = make_launches(layer, run);
  std::vector<std::vector<cuda::DeviceSegment>> lists(launches.size());
  for (std::size_t i = 0; i < launches.size(); ++i) {
    std::size_t max_records = 0;
    for (const Cut& cut : launches[i]) {
      const DType dtype = layer.shape.dtype_of(cut.expert);
      const std::size_t offset = cut.first_record * 3 * padded(cols) * size_of(dtype);
      lists[i].push_back(
          {records[cut.expert].data() + offset, static_cast<std::int32_t>(cut.expert),
           static_cast<std::int32_t>(cut.first_record), static_cast<std::int32_t>(cut.num_records),
           static_cast<std::int32_t>(dtype)});
      max_records = std::max(max_records, cut.num_records);
    }
    scratch.push_back(copy_of(lists[i]));
    const auto* list = scratch.back().as<cuda::DeviceSegment>();
    const std::size_t count = lists[i].size();
    if (!run.many) {
      cuda::compute_segments_few(stream, work, list, count, max_records);
      continue;
    }
    const std::size_t bytes = cuda::grouping_bytes(layer.shape, tokens.count, tokens.slots);
    scratch.emplace_back(bytes, "a test's groups");
    cuda::compute_segments_many(stream, work, list, count, max_records, scratch.back().data(),
                                bytes);
  }
  cuda::sum_experts(stream, work, 0.5f, {device_y.as<float>(), tokens.count, cols, pitch});
  cuda::copy_async(stream, reinterpret_cast<std::byte*>(y.data()), device_y.data(),
                   y.size() * sizeof(float));
  stream.synchronize();
  std::vector<float> result;
  for (std::size_t t = 0; t < tokens.count; ++t) {
    for (std::size_t c = 0; c < pitch; ++c) {
      if (c < cols) {
        result.push_back(y[t * pitch + c]);
      } else {
        CHECK_EQ(y[t * pitch + c], 0.25f);  // padding is not touched
      }
    }
  }
  return result;
}

double relative_error(const std::vector<float>& found, const std::vector<float>& expected,
                      std::size_t cols) {
  CHECK_EQ(found.size(), expected.size());
  double worst = 0;
  for (std::size_t row = 0; row < expected.size(); row += cols) {
    double difference = 0;
    double size = 0;
    for (std::size_t i = row; i < row + cols; ++i) {
      if (!std::isfinite(found[i])) return INFINITY;
      difference = std::max(difference, std::fabs(static_cast<double>(found[i]) - expected[i]));
      size = std::max(size, std::fabs(static_cast<double>(expected[i])));
    }
    worst = std::max(worst, difference / size);
  }
  return worst;
}

}  // namespace moerun::test
