// The whole way from a token's state to its experts in one launch, for one or two routers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Memory of the device that a router's blocks share. All zero before a launch, and after it.
struct RouterMemory {
  std::uint32_t num_done = 0;  // blocks
  float gate = 0;              // the shared gate's product
};

// How the host hears of a choice: `flag`, in memory that it shares, becomes `value` when the
// request's on_host is there.
struct Announcement {
  std::uint32_t* flag = nullptr;
  std::uint32_t value = 0;
};

inline constexpr std::size_t kMaxRouters = 2;

// Whether choose_experts() takes the request: one token, and experts to choose from.
bool is_one_choice(const RouteRequest& request);

// Norm (where there is one), router, choice, shared gate and the copy for the host, of each
// request. `memory` has an element for each request, as `announcements`. InvalidArgument as
// route().
void choose_experts(StreamHandle stream, const RouterParams& params,
                    std::span<const RouteRequest> requests, RouterMemory* memory,
                    std::span<const Announcement> announcements);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
