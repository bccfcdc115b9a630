// Which device is taken, and what is said when one cannot be had or fails: no device is needed.
#include <string>
#include <vector>

#include "base/bytes_text.h"
#include "base/error.h"
#include "check.h"
#include "device/cuda_usable.h"
#include "device/device_messages.h"
#include "model/device_choice.h"

namespace moerun::test {
namespace {

constexpr std::size_t kGiB = std::size_t{1} << 30;

CudaInfo found(const std::vector<CudaDevice>& devices, int driver = 13000, int runtime = 13000) {
  CudaInfo info;
  info.compiled = true;
  info.driver_version = driver;
  info.runtime_version = runtime;
  info.architectures = {"sm_80", "sm_90", "compute_90"};
  info.devices = devices;
  judge_cuda(info, CudaAnswer::devices, "");
  return info;
}

CudaInfo without_devices(CudaAnswer answer, int driver, const std::string& failure = "") {
  CudaInfo info;
  info.driver_version = driver;
  info.runtime_version = 13000;
  judge_cuda(info, answer, failure);
  return info;
}

const CudaDevice kVolta{"Tesla V100", 7, 0, 16 * kGiB};
const CudaDevice kAda{"RTX 4090", 8, 9, 24 * kGiB};
const CudaDevice kHopper{"NVIDIA H100", 9, 0, 80 * kGiB};
const CudaDevice kBlackwell{"NVIDIA B200", 10, 0, 180 * kGiB};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST("a card is usable where this build has machine code for its major version, or PTX") {
  CHECK(found({kHopper}).available);
  CHECK(found({kAda}).available);        // sm_80 runs on 8.9
  CHECK(found({kBlackwell}).available);  // compute_90 is translated
  CHECK(!found({kVolta}).available);
  CHECK(!found({}).available);
}

TEST("PTX needs a driver as new as the compiler, machine code does not") {
  CHECK(!found({kBlackwell}, 12080, 13000).available);
  CHECK(contains(found({kBlackwell}, 12080, 13000).reason, "update the driver"));
  CHECK(found({kHopper}, 12080, 12090).available);
}

TEST("the first usable card is taken, not the first") {
  const CudaInfo info = found({kVolta, kAda, kHopper});
  CHECK_EQ(info.usable_device, 1);
  CHECK_EQ(choose_device("auto", info).device, "cuda");
  CHECK(contains(choose_device("auto", info).reason, "found RTX 4090 (sm_89, 24 GiB)"));
  CHECK(contains(choose_device("cuda", info).reason, "asked for: RTX 4090"));
  CHECK_EQ(choose_device("cpu", info).device, "cpu");
}

TEST("an unsupported card gives the CPU on auto, and says what was found and what is needed") {
  const CudaInfo info = found({kVolta});
  CHECK_EQ(choose_device("auto", info).device, "cpu");
  const std::string reason = choose_device("auto", info).reason;
  CHECK(contains(reason, "Tesla V100 (sm_70, 16 GiB)"));
  CHECK(contains(reason, "sm_80, sm_90, compute_90"));
  CHECK(contains(reason, "CMAKE_CUDA_ARCHITECTURES"));
  CHECK_THROWS(InvalidArgument, choose_device("cuda", info), "sm_70", "use cpu or auto");
}

TEST("no driver, an old driver, no device and a failing call each have a reason") {
  const CudaInfo none = without_devices(CudaAnswer::driver_too_old, 0);
  CHECK(contains(none.reason, "no NVIDIA driver"));
  const CudaInfo old = without_devices(CudaAnswer::driver_too_old, 12040);
  CHECK(contains(old.reason, "supports CUDA 12.4") && contains(old.reason, "needs 13.0"));
  CHECK(contains(old.reason, "update the driver"));
  const CudaInfo hidden = without_devices(CudaAnswer::no_device, 13000);
  CHECK(contains(hidden.reason, "finds no device") &&
        contains(hidden.reason, "CUDA_VISIBLE_DEVICES"));
  const CudaInfo broken = without_devices(CudaAnswer::failed, 13000, "cudaGetDeviceCount: broken");
  CHECK_EQ(broken.reason, "cudaGetDeviceCount: broken");
  for (const auto& info : {none, old, hidden, broken}) {
    CHECK(!info.available);
    CHECK_EQ(choose_device("auto", info).device, "cpu");
    CHECK_EQ(choose_device("auto", info).reason, "no CUDA: " + info.reason);
    CHECK_THROWS(InvalidArgument, choose_device("cuda", info), info.reason);
  }
  CHECK_THROWS(InvalidArgument, choose_device("toaster", none), "toaster");
}

TEST("a device without enough memory says how much, for what, and how much others use") {
  const std::string text = out_of_device_memory("the KV cache", 2 * kGiB, {kGiB, 79 * kGiB}).what();
  CHECK(contains(text, "the KV cache: 2 GiB of device memory were asked for"));
  CHECK(contains(text, "only 1 GiB are free: 78 GiB of 79 GiB are in use by others"));
  CHECK(contains(out_of_device_memory("making a CUDA context").what(), "nvidia-smi"));
}

TEST("page-locked memory that is refused says how much, for what, and what to do") {
  const std::string text = out_of_pinned_memory("experts", 3 * kGiB + kGiB / 2).what();
  CHECK(contains(text, "experts: the system refused 3.5 GiB of page-locked memory"));
  CHECK(contains(text, "--pin-limit") && contains(text, "ulimit -l"));
}

TEST("a failure that CUDA does not recover from asks for a new process") {
  const DeviceError final_one =
      device_failure("waiting for a stream", "an illegal memory access", "cudaErrorIllegalAddress");
  CHECK(final_one.needs_restart());
  CHECK(contains(final_one.what(), "waiting for a stream: an illegal memory access"));
  CHECK(contains(final_one.what(), "start it again"));
  const DeviceError other = device_failure("gemm", "too many resources requested for launch",
                                           "cudaErrorLaunchOutOfResources");
  CHECK(!other.needs_restart());
  CHECK(!contains(other.what(), "start it again"));
}

TEST("sizes are written in the unit that suits them") {
  CHECK_EQ(bytes_text(1001), "1001 bytes");
  CHECK_EQ(bytes_text((std::size_t{5} << 20) / 2), "2.5 MiB");
  CHECK_EQ(bytes_text(kGiB / 4 * 5), "1.25 GiB");
  CHECK_EQ(bytes_text(294912), "288 KiB");
  CHECK_EQ(bytes_text(294911, Rounding::down), "287.99 KiB");
  CHECK_EQ(bytes_text(294913, Rounding::up), "288.01 KiB");
  CHECK_EQ(bytes_text(kGiB * 2048), "2 TiB");
}

}  // namespace moerun::test
