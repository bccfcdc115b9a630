#include "weights/rope.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>

namespace moerun {
namespace {

// theta ^ (2 i / head_dim) for every pair i. The power in double and then rounded: the best float.
std::vector<float> position_frequencies(double theta, std::int64_t head_dim) {
  std::vector<float> frequencies;
  const auto base = static_cast<double>(static_cast<float>(theta));
  for (std::int64_t i = 0; i < head_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(head_dim);
    frequencies.push_back(static_cast<float>(std::pow(base, static_cast<double>(exponent))));
  }
  return frequencies;
}

std::vector<float> inverse(std::vector<float> frequencies) {
  for (float& f : frequencies) f = 1.0f / f;
  return frequencies;
}

std::vector<float> inverse_scaled(std::vector<float> frequencies,
                                  const std::vector<double>& factors) {
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = 1.0f / (static_cast<float>(factors[i]) * frequencies[i]);
  }
  return frequencies;
}

// Long wavelengths are stretched, short ones kept, those between interpolated.
void apply_llama3(const RopeConfig& rope, std::vector<float>& inv_freq) {
  const auto context = static_cast<double>(rope.original_max_position_embeddings);
  const auto low_wavelength = static_cast<float>(context / rope.low_freq_factor);
  const auto high_wavelength = static_cast<float>(context / rope.high_freq_factor);
  const auto factor = static_cast<float>(rope.factor);
  const auto low = static_cast<float>(rope.low_freq_factor);
  const auto width = static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
  for (float& f : inv_freq) {
    const float wavelength = static_cast<float>(2.0 * std::numbers::pi) / f;
    if (wavelength > low_wavelength) {
      f = f / factor;
    } else if (!(wavelength < high_wavelength)) {
      const float smooth = (static_cast<float>(context) / wavelength - low) / width;
      f = (1.0f - smooth) * f / factor + smooth * f;
    }
  }
}

// The pair, as a real number, that turns `rotations` times within the original context.
double yarn_correction_dim(const RopeConfig& rope, double dim, double rotations) {
  const auto context = static_cast<double>(rope.original_max_position_embeddings);
  return dim * std::log(context / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(rope.theta));
}

std::vector<float> yarn_inv_freq(const RopeConfig& rope, std::int64_t head_dim) {
  const auto dim = static_cast<double>(head_dim);
  double low = yarn_correction_dim(rope, dim, rope.beta_fast);
  double high = yarn_correction_dim(rope, dim, rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  auto width = static_cast<float>(high - low);
  if (width == 0.0f) width = 0.001f;  // or the ramp would divide by zero

  std::vector<float> frequencies = position_frequencies(rope.theta, head_dim);
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float ramp = (static_cast<float>(i) - static_cast<float>(low)) / width;
    const float extrapolated_share = 1.0f - std::clamp(ramp, 0.0f, 1.0f);
    const float extrapolated = 1.0f / frequencies[i];
    const float interpolated = 1.0f / (static_cast<float>(rope.factor) * frequencies[i]);
    frequencies[i] = interpolated * (1.0f - extrapolated_share) + extrapolated * extrapolated_share;
  }
  return frequencies;
}

double yarn_mscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double yarn_scale(const RopeConfig& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  const double mscale = rope.mscale.value_or(0.0);
  const double mscale_all_dim = rope.mscale_all_dim.value_or(0.0);
  if (mscale != 0.0 && mscale_all_dim != 0.0) {
    return yarn_mscale(rope.factor, mscale) / yarn_mscale(rope.factor, mscale_all_dim);
  }
  return yarn_mscale(rope.factor, 1.0);
}

double longrope_scale(const RopeConfig& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  if (rope.factor <= 1.0) return 1.0;
  const auto context = static_cast<double>(rope.original_max_position_embeddings);
  return std::sqrt(1.0 + std::log(rope.factor) / std::log(context));
}

}  // namespace

RopeTable make_rope_table(const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  RopeTable table;
  switch (rope.kind) {
    case RopeKind::standard:
      table.inv_freq = inverse(position_frequencies(rope.theta, config.head_dim));
      break;
    case RopeKind::linear:
      table.inv_freq = inverse(position_frequencies(rope.theta, config.head_dim));
      for (float& f : table.inv_freq) f /= static_cast<float>(rope.factor);
      break;
    case RopeKind::llama3:
      table.inv_freq = inverse(position_frequencies(rope.theta, config.head_dim));
      apply_llama3(rope, table.inv_freq);
      break;
    case RopeKind::yarn:
      table.inv_freq = yarn_inv_freq(rope, config.head_dim);
      table.scale = static_cast<float>(yarn_scale(rope));
      break;
    case RopeKind::longrope: {
      const auto frequencies = position_frequencies(rope.theta, config.head_dim);
      table.inv_freq = inverse_scaled(frequencies, rope.short_factor);
      table.inv_freq_long = inverse_scaled(frequencies, rope.long_factor);
      // Phi-MoE's own code has a scale for each set; other families one for both.
      const double scale = longrope_scale(rope);
      table.scale = static_cast<float>(rope.short_mscale.value_or(scale));
      table.scale_long = static_cast<float>(rope.long_mscale.value_or(scale));
      table.long_above = rope.original_max_position_embeddings;
      break;
    }
  }
  return table;
}

}  // namespace moerun
