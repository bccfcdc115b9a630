#include "replay/sim_backend.h"

#include <sys/mman.h>

#include <cerrno>
#include <system_error>

#include "base/error.h"

namespace moerun {
namespace {

class SimStream final : public Stream {
 public:
  void synchronize() override {}
  std::size_t scratch_bytes() const override { return 0; }
};

// Pages that nobody may touch cost nothing, and a mistake shows at once.
class AddressSpace final : public DeviceBuffer {
 public:
  static std::unique_ptr<AddressSpace> reserve(std::size_t bytes, std::string_view what) {
    if (bytes == 0) return std::unique_ptr<AddressSpace>(new AddressSpace(nullptr, 0));
    void* data = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        /*fd=*/-1, /*offset=*/0);
    if (data == MAP_FAILED) {
      throw OutOfMemory(message("the system refused ", bytes, " bytes of address space for ", what,
                                ": ", std::system_category().message(errno)));
    }
    return std::unique_ptr<AddressSpace>(new AddressSpace(static_cast<std::byte*>(data), bytes));
  }
  ~AddressSpace() override {
    if (data() != nullptr) ::munmap(data(), size());
  }

 private:
  using DeviceBuffer::DeviceBuffer;
};

[[noreturn]] void refuse() { throw InvalidArgument("the simulated device computes nothing"); }

}  // namespace

std::unique_ptr<Stream> SimBackend::make_stream() { return std::make_unique<SimStream>(); }

std::unique_ptr<DeviceBuffer> SimBackend::allocate(std::size_t bytes, std::string_view what,
                                                   MemoryUse) {
  return AddressSpace::reserve(bytes, what);
}

void SimBackend::embed(Stream&, const MatrixView&, std::span<const std::int32_t>, float,
                       Activations) {
  refuse();
}

void SimBackend::norm(Stream&, const NormWeights&, Activations, Activations) { refuse(); }

void SimBackend::linear(Stream&, const LinearWeights&, Activations, Activations, LinearOutput) {
  refuse();
}

void SimBackend::rotate_and_store(Stream&, const AttentionShape&, const RotaryParams&, Position,
                                  Activations, const KvLayer&) {
  refuse();
}

void SimBackend::attention(Stream&, const AttentionShape&, const AttentionParams&, Position,
                           Activations, const KvLayer&, Activations) {
  refuse();
}

void SimBackend::route(Stream&, const RouterParams&, Activations, Routing) { refuse(); }

void SimBackend::route_shared(Stream&, const MatrixView&, std::int32_t, Activations, Routing) {
  refuse();
}

void SimBackend::begin_experts(Stream&, const ExpertShape&, Activations, const Routing&) {
  refuse();
}

void SimBackend::compute_segments(Stream&, std::span<const Segment>) { refuse(); }

void SimBackend::finish_experts(Stream&, float, Activations) { refuse(); }

MemoryState SimBackend::memory() const {
  constexpr auto kAll = static_cast<std::size_t>(-1);
  return {kAll, kAll};
}

}  // namespace moerun
