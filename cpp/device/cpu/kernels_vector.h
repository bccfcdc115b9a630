// Element-wise kernels and norms. Included like kernels_dot.h, before it.

// e^x to about one unit in the last place: x = n ln 2 + r, e^r by a polynomial on [-ln2/2, ln2/2].
inline Simd::V exp_vector(Simd::V x) {
  using Vec = Simd::V;
  x = Simd::min(x, Simd::set1(88.3762626f));
  x = Simd::max(x, Simd::set1(-87.3365479f));
  const Vec n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
  // ln 2 in two parts, so that x - n ln 2 keeps its low bits.
  Vec r = Simd::fma(n, Simd::set1(-0.693359375f), x);
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  Vec p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::fma(p, Simd::mul(r, r), Simd::add(r, Simd::set1(1.0f)));
  return Simd::scale_by_power_of_two(p, n);
}

// A row with a score that is no finite number becomes NaN as a whole: comparisons and the bounds of
// exp_vector() would make ordinary numbers of it.
void softmax_row(float* x, std::size_t n, float scale) {
  constexpr std::size_t width = Simd::kWidth;
  if (n == 0) return;
  // Lanes behind the row's end repeat its first score, so that no row has a scalar tail.
  const std::size_t whole = (n + width - 1) / width * width;
  for (std::size_t i = n; i < whole; ++i) x[i] = x[0];
  const Simd::V s = Simd::set1(scale);
  Simd::V top = Simd::set1(-__builtin_inff());
  Simd::V zeros = Simd::zero();  // stays so, unless a score is not finite
  for (std::size_t i = 0; i < whole; i += width) {
    const Simd::V score = Simd::load(x + i);
    top = Simd::max(top, Simd::mul(score, s));
    zeros = Simd::fma(score, Simd::zero(), zeros);
  }
  if (!(Simd::sum_lanes(zeros) == 0.0f)) {
    for (std::size_t i = 0; i < n; ++i) x[i] = __builtin_nanf("");
    for (std::size_t i = n; i < whole; ++i) x[i] = 0;
    return;
  }
  alignas(64) float lanes[width];
  Simd::store(lanes, top);
  float largest = lanes[0];
  for (std::size_t l = 1; l < width; ++l) largest = largest < lanes[l] ? lanes[l] : largest;
  const Simd::V shift = Simd::set1(-largest);
  for (std::size_t i = n; i < whole; ++i) x[i] = 0;
  Simd::V sum = Simd::zero();
  for (std::size_t i = 0; i < whole; i += width) {
    Simd::V e = exp_vector(Simd::fma(Simd::load(x + i), s, shift));
    Simd::store(x + i, e);
    if (i + width > n) {
      for (std::size_t j = n; j < whole; ++j) x[j] = 0;
      e = Simd::load(x + i);
    }
    sum = Simd::add(sum, e);
  }
  const Simd::V inverse = Simd::set1(1.0f / Simd::sum_lanes(sum));
  for (std::size_t i = 0; i < whole; i += width) {
    Simd::store(x + i, Simd::mul(Simd::load(x + i), inverse));
  }
}

void rms_norm_row(const float* x, const float* weight, float eps, float* out, std::size_t n) {
  constexpr std::size_t width = Simd::kWidth;
  const std::size_t whole = (n + width - 1) / width * width;
  Simd::V squares = Simd::zero();
  for (std::size_t i = 0; i < whole; i += width) {
    const Simd::V v = Simd::load(x + i);
    squares = Simd::fma(v, v, squares);
  }
  const float mean = Simd::sum_lanes(squares) / static_cast<float>(n);
  const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
  for (std::size_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * inverse);
}

void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, float* out,
                    std::size_t n) {
  constexpr std::size_t width = Simd::kWidth;
  const std::size_t whole = (n + width - 1) / width * width;
  Simd::V total = Simd::zero();
  for (std::size_t i = 0; i < whole; i += width) total = Simd::add(total, Simd::load(x + i));
  const float mean = Simd::sum_lanes(total) / static_cast<float>(n);
  alignas(64) float tail[width] = {};
  Simd::V squares = Simd::zero();
  for (std::size_t i = 0; i < whole; i += width) {
    Simd::V v = Simd::sub(Simd::load(x + i), Simd::set1(mean));
    if (i + width > n) {  // the padding is not part of the variance
      for (std::size_t j = 0; j < n - i; ++j) tail[j] = x[i + j] - mean;
      v = Simd::load(tail);
    }
    squares = Simd::fma(v, v, squares);
  }
  const float variance = Simd::sum_lanes(squares) / static_cast<float>(n);
  const float inverse = 1.0f / __builtin_sqrtf(variance + eps);
  for (std::size_t i = 0; i < n; ++i) {
    const float centred = (x[i] - mean) * inverse;
    out[i] = bias ? centred * weight[i] + bias[i] : centred * weight[i];
  }
}

void scale_row(float w, const float* x, float* y, std::size_t n, bool accumulate) {
  constexpr std::size_t width = Simd::kWidth;
  const Simd::V factor = Simd::set1(w);
  for (std::size_t i = 0; i < n; i += width) {
    const Simd::V v = Simd::load(x + i);
    Simd::store(y + i, accumulate ? Simd::fma(factor, v, Simd::load(y + i)) : Simd::mul(factor, v));
  }
}

// The cheapest use of every element: what remains is the speed of memory. n a multiple of 4
// vectors.
float read_all_floats(const float* x, std::size_t n) {
  constexpr std::size_t width = Simd::kWidth;
  Simd::V sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  for (std::size_t i = 0; i < n; i += 4 * width) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < 4; ++v) {
      sums[v] = Simd::add(sums[v], Simd::load(x + i + v * width));
      // The hardware's own prefetcher stops at every page.
      __builtin_prefetch(x + i + v * width + 1024);
    }
  }
  return Simd::sum_lanes(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
}
