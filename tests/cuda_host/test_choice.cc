// A token's way to its experts in one launch, against the CPU backend's operations.
#include <cmath>
#include <memory>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "kernels/choose_experts.h"
#include "on_device.h"
#include "random_weights.h"

namespace moerun::test {
namespace {

struct Sizes {
  std::size_t tokens;
  std::size_t hidden;
  std::size_t num_experts;
  std::size_t top_k;
  bool has_shared;
};

// Weights of a router in some dtype, for the host and on the device.
class Weights {
 public:
  Weights(std::size_t rows, std::size_t cols, DType dtype, RandomWeights& random)
      : bytes_(encode(random.matrix(rows, cols), dtype)),
        device_(bytes_),
        view_{bytes_.data(), dtype, rows, cols, padded(cols)} {}

  MatrixView host() const { return view_; }
  MatrixView device() const {
    MatrixView view = view_;
    view.data = device_.data();
    return view;
  }

 private:
  std::vector<std::byte> bytes_;
  OnDevice<std::byte> device_;
  MatrixView view_;
};

// A request with everything that it needs, in both places.
class Request {
 public:
  Request(const Sizes& sizes, DType dtype, NormKind kind, bool has_norm, RandomWeights& random)
      : sizes_(sizes),
        slots_(sizes.top_k + (sizes.has_shared ? 1 : 0)),
        router_(sizes.num_experts, sizes.hidden, dtype, random),
        gate_(1, sizes.hidden, dtype, random),
        x_(random.matrix(sizes.tokens, sizes.hidden), sizes.tokens, sizes.hidden),
        normed_(sizes.tokens, sizes.hidden),
        logits_(sizes.tokens, sizes.num_experts),
        norm_values_(random.matrix(2, sizes.hidden)),
        device_norm_values_(norm_values_),
        norm_{norm_of(kind, norm_values_.data(), sizes.hidden)},
        device_norm_{norm_of(kind, device_norm_values_.data(), sizes.hidden)},
        has_norm_(has_norm),
        ids_(sizes.tokens * slots_),
        weights_(sizes.tokens * slots_),
        device_ids_(ids_),
        device_weights_(weights_),
        host_ids_(ids_),
        host_weights_(weights_) {}

  RouteRequest on_cpu() {
    const Routing routing{ids_.data(), weights_.data(), sizes_.tokens, slots_};
    return {router_.host(),
            has_norm_ ? &norm_ : nullptr,
            shared_gate(gate_.host()),
            sizes_.has_shared,
            x_.host(),
            normed_.host(),
            logits_.host(),
            routing,
            routing};
  }
  RouteRequest on_device() {
    return {router_.device(),
            has_norm_ ? &device_norm_ : nullptr,
            shared_gate(gate_.device()),
            sizes_.has_shared,
            x_.device(),
            normed_.device(),
            logits_.device(),
            {device_ids_.data(), device_weights_.data(), sizes_.tokens, slots_},
            {host_ids_.data(), host_weights_.data(), sizes_.tokens, slots_}};
  }
  // What the host was told, and what lies on the device once it has run.
  void check_host_copy() const {
    CHECK(host_ids_.values() == ids_);
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      CHECK_NEAR(host_weights_.values()[i], weights_[i], 1e-4);
    }
  }
  void check_same() const {
    CHECK(device_ids_.values() == ids_);
    CHECK(device_weights_.values() == host_weights_.values());
    logits_.check_same(1e-5);
  }
  std::vector<std::int32_t> chosen() const { return host_ids_.values(); }

 private:
  static NormWeights norm_of(NormKind kind, const float* values, std::size_t hidden) {
    return {kind, values, kind == NormKind::layer ? values + padded(hidden) : nullptr, 1e-5f};
  }
  MatrixView shared_gate(const MatrixView& gate) const {
    return sizes_.has_shared ? gate : MatrixView{};
  }

  Sizes sizes_;
  std::size_t slots_;
  Weights router_;
  Weights gate_;
  TestRows x_;
  TestRows normed_;
  TestRows logits_;
  std::vector<float> norm_values_;
  OnDevice<float> device_norm_values_;
  NormWeights norm_;
  NormWeights device_norm_;
  bool has_norm_;
  std::vector<std::int32_t> ids_;
  std::vector<float> weights_;
  OnDevice<std::int32_t> device_ids_;
  OnDevice<float> device_weights_;
  OnDevice<std::int32_t> host_ids_;
  OnDevice<float> host_weights_;
};

}  // namespace

TEST("one or two routers choose in one launch what the CPU chooses") {
  const auto cpu = make_cpu_backend(1, "portable");
  const auto cpu_stream = cpu->make_stream();
  const auto device = make_device_backend();
  const auto stream = device->make_stream();
  RandomWeights random(1);
  for (const Sizes sizes : {Sizes{1, 96, 8, 2, false}, Sizes{1, 40, 61, 4, true},
                            Sizes{1, 160, 130, 8, true}, Sizes{3, 96, 16, 2, true}}) {
    for (const DType dtype : kAllDTypes) {
      for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
        for (const RouterKind router : {RouterKind::softmax_top_k, RouterKind::top_k_softmax}) {
          const RouterParams params{router, true, 0, sizes.top_k};
          Request own(sizes, dtype, kind, /*has_norm=*/false, random);
          Request next(sizes, dtype, kind, /*has_norm=*/true, random);
          const RouteRequest on_cpu[] = {own.on_cpu(), next.on_cpu()};
          const RouteRequest on_device[] = {own.on_device(), next.on_device()};
          cpu->choose_experts(*cpu_stream, params, on_cpu);
          device->choose_experts(*stream, params, on_device);
          device->wait_for_choice(*stream, 0);
          own.check_host_copy();
          device->wait_for_choice(*stream, 1);
          next.check_host_copy();
          stream->synchronize();
          own.check_same();
          next.check_same();
        }
      }
    }
  }
}

#if defined(MOERUN_CUDA_HOST)  // a card need not be as late as that
TEST("the host hears of a choice before what was issued after it has run") {
  const auto device = make_device_backend();
  const auto stream = device->make_stream();
  RandomWeights random(2);
  Request request({1, 96, 16, 2, false}, DType::bf16, NormKind::rms, false, random);
  const RouteRequest on_device[] = {request.on_device()};
  const OnDevice<float> target(std::vector<float>{1});
  const float two = 2;
  set_order(Order::late_copies, 1);
  device->choose_experts(*stream, {RouterKind::softmax_top_k, true, 0, 2}, on_device);
  device->copy(*stream, reinterpret_cast<std::byte*>(target.data()),
               reinterpret_cast<const std::byte*>(&two), sizeof(two));
  device->wait_for_choice(*stream, 0);
  CHECK_EQ(target.values()[0], 1.0f);
  stream->synchronize();
  CHECK_EQ(target.values()[0], 2.0f);
}

TEST("a router waits for the whole of its normalised input") {
  RandomWeights random(3);
  Request request({1, 96, 61, 4, true}, DType::f32, NormKind::rms, true, random);
  const RouteRequest on_device[] = {request.on_device()};
  TestStream stream;
  const OnDevice<cuda::RouterMemory> memory(std::vector<cuda::RouterMemory>(1));
  const OnDevice<std::uint32_t> flag(std::size_t{1});
  const cuda::Announcement announcements[] = {{flag.data(), 7}};
  check_needs_barrier(1, [&] {
    cuda::choose_experts(stream, {RouterKind::softmax_top_k, true, 0, 4}, on_device, memory.data(),
                         announcements);
    stream.synchronize();
    return request.chosen();
  });
  CHECK_EQ(flag.values()[0], 7u);
}
#endif

TEST("one launch takes no more routers than it has room for") {
  RandomWeights random(4);
  Request request({1, 32, 8, 2, false}, DType::f32, NormKind::rms, false, random);
  const std::vector<RouteRequest> three(3, request.on_device());
  TestStream stream;
  CHECK_THROWS(InvalidArgument, cuda::choose_experts(stream, {}, three, nullptr, {}), "3 routers",
               "2");
}

}  // namespace moerun::test
