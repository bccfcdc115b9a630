// For tests of what is made of ptxas' words: a kernel that spills, and one that does not.
namespace moerun::cuda {
namespace {

__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* in, float* out) {
  constexpr unsigned kNumbers = 96;  // more than the 32 registers of a thread
  float numbers[kNumbers];
#pragma unroll
  for (unsigned i = 0; i < kNumbers; ++i) numbers[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (unsigned i = 0; i < kNumbers; ++i) out[i * 1024 + threadIdx.x] = numbers[kNumbers - 1 - i];
}

__global__ void __launch_bounds__(256) sound_kernel(const float* in, float* out) {
  __shared__ float shared[256];
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[255 - threadIdx.x];
}

}  // namespace

void launch_both(const float* in, float* out) {
  spilling_kernel<<<1, 1024>>>(in, out);
  sound_kernel<<<1, 256>>>(in, out);
}

}  // namespace moerun::cuda
