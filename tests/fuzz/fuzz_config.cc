// config.json: any bytes either parse into a config within its bounds, or throw a moerun::Error
// that names the file.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "weights/model_config.h"
#include "weights/rope.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const moerun::ModelConfig& config) {
  require(config.num_experts >= config.top_k && config.top_k >= 1);
  require(config.num_attention_heads % config.num_key_value_heads == 0);
  const auto num_layers = static_cast<std::size_t>(config.num_hidden_layers);
  require(config.is_moe_layer.size() == num_layers && config.num_moe_layers() > 0);
  require(config.sliding_window.size() == num_layers);
  require(config.expert_bytes(4) > 0);
  const moerun::RopeTable table = moerun::make_rope_table(config);
  require(table.inv_freq.size() * 2 == static_cast<std::size_t>(config.head_dim));
  for (const float f : table.inv_freq) require(std::isfinite(f));
  for (const float f : table.inv_freq_long) require(std::isfinite(f));
  require(std::isfinite(table.scale) && std::isfinite(table.scale_long));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    check(moerun::parse_model_config(text, "config.json"));
  } catch (const moerun::Error& error) {
    require(std::string_view(error.what()).starts_with("config.json: "));
  }
  return 0;
}
