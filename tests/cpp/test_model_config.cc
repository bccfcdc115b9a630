#include "weights/model_config.h"

#include <cmath>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "temp_folder.h"

namespace moerun {
namespace {

using test::TempFolder;

ModelConfig parse(const std::string& text) { return parse_model_config(text, "config.json"); }

// A config of a family with only these fields; everything else is the family's default.
std::string family(const std::string& model_type, const std::string& fields = "") {
  return R"({"model_type":")" + model_type + "\"" + (fields.empty() ? "" : ",") + fields + "}";
}

template <typename E = FormatError>
void refuses(const std::string& text, std::vector<std::string> parts) {
  parts.push_back("config.json");
  test::expect_throw<E>(__FILE__, __LINE__, [&] { parse(text); }, parts);
}

TEST("config: fields left out are the defaults of Hugging Face") {
  const auto olmoe = parse(family("olmoe"));
  CHECK_EQ(olmoe.vocab_size, 50304);
  CHECK_EQ(olmoe.num_key_value_heads, 16);
  CHECK_EQ(olmoe.head_dim, 128);
  CHECK_EQ(olmoe.moe_intermediate_size, 2048);
  CHECK(olmoe.qk_norm == QkNorm::full);
  CHECK_EQ(olmoe.num_moe_layers(), 16);
  CHECK(olmoe.eos_token_ids == std::vector<std::int64_t>{50279});
  CHECK(!olmoe.norm_topk_prob && !olmoe.qkv_bias && !olmoe.clip_qkv);

  const auto mixtral = parse(family("mixtral"));
  CHECK_EQ(mixtral.num_key_value_heads, 8);
  CHECK_EQ(mixtral.rope.theta, 1e6);
  CHECK_EQ(mixtral.sliding_window.at(0), 0);
  CHECK(mixtral.norm_topk_prob && mixtral.not_runnable.empty());

  const auto qwen2 = parse(family("qwen2_moe"));
  CHECK(qwen2.qkv_bias && !qwen2.o_bias && qwen2.eos_token_ids.empty());
  CHECK_EQ(qwen2.shared_expert_intermediate_size, 5632);
  CHECK_EQ(qwen2.dense_intermediate_size, 5632);

  const auto qwen3 = parse(family("qwen3_moe"));
  CHECK_EQ(qwen3.num_experts, 128);
  CHECK_EQ(qwen3.head_dim, 64);
  CHECK(qwen3.qk_norm == QkNorm::per_head);
  CHECK_EQ(qwen3.shared_expert_intermediate_size, 0);

  const auto granite = parse(family("granitemoe"));
  CHECK_EQ(granite.attention_multiplier, 1.0);
  CHECK(granite.router == RouterKind::top_k_softmax);

  const auto phi = parse(family("phimoe"));
  CHECK(phi.norm == NormKind::layer && phi.router == RouterKind::sparse_mixer);
  CHECK_EQ(phi.router_jitter_noise, 0.01);
  CHECK_NEAR(phi.attention_multiplier, 1.0 / std::sqrt(128.0), 1e-15);
}

TEST("config: OLMoE as published, and its variants") {
  const auto c = parse(R"({"architectures":["OlmoeForCausalLM"],"attention_bias":true,
    "clip_qkv":8.0,"eos_token_id":50279,"hidden_act":"silu","hidden_size":2048,
    "intermediate_size":1024,"max_position_embeddings":4096,"model_type":"olmoe",
    "norm_topk_prob":true,"num_attention_heads":16,"num_experts":64,"num_experts_per_tok":8,
    "num_hidden_layers":16,"num_key_value_heads":null,"rms_norm_eps":1e-05,"rope_scaling":null,
    "rope_theta":10000.0,"tie_word_embeddings":true,"torch_dtype":"bfloat16","vocab_size":50304})");
  CHECK_EQ(c.num_key_value_heads, 16);
  CHECK_EQ(c.moe_intermediate_size, 1024);
  CHECK_EQ(c.clip_qkv.value(), 8.0);
  CHECK(c.qkv_bias && c.o_bias && c.norm_topk_prob && c.tie_word_embeddings);
  CHECK_EQ(c.dtype, "bfloat16");
  CHECK_EQ(c.expert_bytes(2), 1024u * 3 * 2048 * 2);
  refuses(family("olmoe", R"("head_dim":64)"), {"'head_dim'", "16 heads of 64", "2048"});
}

TEST("config: a row of an expert takes its padding in memory") {
  const auto c = parse(family("mixtral", R"("hidden_size":100,"intermediate_size":7,
    "num_attention_heads":5,"num_key_value_heads":1)"));
  CHECK_EQ(c.expert_bytes(4), 7u * 3 * 128 * 4);
}

TEST("config: old and new names mean the same") {
  const auto old_form = parse(family("qwen3_moe", R"("num_experts":16,"torch_dtype":"float16",
    "rope_theta":5e6,"rope_scaling":{"type":"linear","factor":2})"));
  const auto new_form = parse(family("qwen3_moe", R"("num_local_experts":16,"dtype":"float16",
    "rope_parameters":{"rope_theta":5e6,"rope_type":"linear","factor":2.0})"));
  for (const auto& c : {old_form, new_form}) {
    CHECK_EQ(c.num_experts, 16);
    CHECK_EQ(c.dtype, "float16");
    CHECK_EQ(c.rope.theta, 5e6);
    CHECK(c.rope.kind == RopeKind::linear);
    CHECK_EQ(c.rope.factor, 2.0);
  }
  refuses(family("mixtral", R"("num_local_experts":8,"num_experts":16)"),
          {"'num_experts'", "16", "'num_local_experts'", "8"});
}

TEST("config: Granite's multipliers and its name for the activation") {
  const auto c = parse(family("granitemoe", R"("activation_function":"silu",
    "attention_multiplier":0.015625,"embedding_multiplier":12.0,"logits_scaling":6.0,
    "residual_multiplier":0.22,"num_attention_heads":24,"num_key_value_heads":8,
    "hidden_size":1536,"eos_token_id":[0,5])"));
  CHECK_EQ(c.attention_multiplier, 0.015625);
  CHECK_EQ(c.embedding_multiplier, 12.0);
  CHECK_EQ(c.residual_multiplier, 0.22);
  CHECK_EQ(c.logits_divisor, 6.0);
  CHECK(c.eos_token_ids == (std::vector<std::int64_t>{0, 5}));
  refuses(family("granitemoe", R"("logits_scaling":0)"), {"'logits_scaling'", "found 0"});
}

TEST("config: Phi-MoE with its biases and longrope") {
  const std::string rope = R"("head_dim":4,"attention_bias":true,"lm_head_bias":true,
    "original_max_position_embeddings":4096,"sliding_window":131072,)";
  const auto c = parse(family("phimoe", rope + R"("rope_scaling":{"type":"longrope",
    "short_factor":[1.0,1.1],"long_factor":[2,3],"short_mscale":1.24,"long_mscale":1.3})"));
  CHECK(c.qkv_bias && c.o_bias && c.lm_head_bias);
  CHECK_EQ(c.sliding_window.at(31), 131072);
  CHECK(c.rope.kind == RopeKind::longrope);
  CHECK(c.rope.long_factor == (std::vector<double>{2.0, 3.0}));
  CHECK_EQ(c.rope.original_max_position_embeddings, 4096);
  CHECK_EQ(c.rope.factor, 32.0);
  CHECK_EQ(c.rope.short_mscale.value(), 1.24);
  refuses(family("phimoe", rope + R"("rope_scaling":{"type":"su","short_factor":[1,1],
    "long_factor":[1,1],"short_mscale":1})"),
          {"'rope_scaling.long_mscale'", "missing"});
  refuses(family("phimoe", rope + R"("rope_scaling":{"type":"su","short_factor":[1,1],
    "long_factor":[1]})"),
          {"'rope_scaling.long_factor'", "a list of 1", "a list of 2"});
  refuses(family("phimoe", R"("num_experts_per_tok":1)"), {"'num_experts_per_tok'", "found 1"});
  refuses<UnsupportedModel>(family("phimoe", R"("rope_scaling":{"type":"yarn","factor":2})"),
                            {"'rope_scaling.type'", "'yarn'", "longrope"});
}

TEST("config: rope scaling forms, and those that are not supported") {
  const auto llama3 = parse(family("mixtral", R"("rope_scaling":{"rope_type":"llama3","factor":8.0,
    "low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192})"));
  CHECK(llama3.rope.kind == RopeKind::llama3);
  CHECK_EQ(llama3.rope.original_max_position_embeddings, 8192);
  const auto yarn = parse(family("qwen3_moe", R"("rope_scaling":{"rope_type":"yarn",
    "factor":4.0,"original_max_position_embeddings":32768,"beta_fast":0,"truncate":false})"));
  CHECK(yarn.rope.kind == RopeKind::yarn && !yarn.rope.truncate);
  CHECK_EQ(yarn.rope.beta_fast, 32.0);
  CHECK(parse(family("olmoe", R"("rope_scaling":{"rope_type":"default"})")).rope.kind ==
        RopeKind::standard);

  refuses<UnsupportedModel>(family("olmoe", R"("rope_scaling":{"type":"dynamic","factor":2})"),
                            {"'rope_scaling.type'", "'dynamic'", "linear, llama3, yarn"});
  refuses<UnsupportedModel>(family("olmoe", R"("partial_rotary_factor":0.5)"),
                            {"'partial_rotary_factor'", "0.5"});
  refuses<UnsupportedModel>(
      family("qwen2_moe", R"("rope_parameters":{"full_attention":{"rope_theta":1e6}})"),
      {"'rope_parameters.full_attention'"});
  refuses(family("olmoe", R"("rope_scaling":"linear")"), {"'rope_scaling'", "'linear'"});
  refuses(family("olmoe", R"("rope_scaling":{"type":"linear"})"),
          {"'rope_scaling.factor'", "missing"});
  refuses(family("olmoe", R"("rope_scaling":{"type":"linear","factor":-1})"),
          {"'rope_scaling.factor'", "-1"});
  refuses(family("olmoe", R"("rope_theta":0)"), {"'rope_theta'", "found 0"});
  refuses(family("mixtral", R"("rope_scaling":{"rope_type":"llama3","factor":8.0,
    "low_freq_factor":4.0,"high_freq_factor":4.0})"),
          {"'rope_scaling.high_freq_factor'"});
}

TEST("config: which Qwen layers have experts") {
  const auto c = parse(family("qwen2_moe", R"("num_hidden_layers":6,"decoder_sparse_step":2,
    "mlp_only_layers":[3,99])"));
  CHECK(c.is_moe_layer == (std::vector<std::uint8_t>{0, 1, 0, 0, 0, 1}));
  CHECK_EQ(c.num_moe_layers(), 2);
  refuses(family("qwen3_moe", R"("mlp_only_layers":[-1])"), {"'mlp_only_layers'", "-1"});
  refuses(family("qwen3_moe", R"("decoder_sparse_step":0)"), {"'decoder_sparse_step'", "found 0"});
  refuses<UnsupportedModel>(family("qwen3_moe", R"("decoder_sparse_step":100)"),
                            {"'decoder_sparse_step'", "no layer with experts"});
}

TEST("config: which layers slide") {
  CHECK_EQ(parse(family("mixtral", R"("sliding_window":4096)")).sliding_window.at(31), 4096);
  const std::string qwen = R"("num_hidden_layers":4,"sliding_window":64)";
  using Windows = std::vector<std::int64_t>;
  CHECK(parse(family("qwen2_moe", qwen)).sliding_window == (Windows{0, 0, 0, 0}));
  CHECK(parse(family("qwen2_moe", qwen + R"(,"use_sliding_window":true)")).sliding_window ==
        (Windows{64, 0, 64, 0}));
  CHECK(parse(family("qwen2_moe", qwen + R"(,"use_sliding_window":true,"max_window_layers":1)"))
            .sliding_window == (Windows{64, 0, 0, 0}));
  CHECK(parse(family("qwen2_moe", qwen + R"(,"use_sliding_window":true,"layer_types":
      ["full_attention","sliding_attention","full_attention","full_attention"])"))
            .sliding_window == (Windows{0, 64, 0, 0}));
  CHECK(parse(family("qwen3_moe", qwen + R"(,"use_sliding_window":true)")).sliding_window ==
        (Windows{64, 64, 64, 64}));
  CHECK(parse(family("qwen3_moe", R"("num_hidden_layers":1,"use_sliding_window":true,
    "sliding_window":null)"))
            .sliding_window == (Windows{0}));
  CHECK(parse(family("qwen2_moe", R"("num_hidden_layers":1,"sliding_window":0)")).sliding_window ==
        (Windows{0}));
  refuses(family("mixtral", R"("sliding_window":0)"), {"'sliding_window'", "found 0"});
  refuses(family("qwen2_moe", qwen + R"(,"layer_types":["full_attention"])"),
          {"'layer_types'", "a list of 1", "4"});
  refuses(family("qwen2_moe", R"("num_hidden_layers":1,"layer_types":["sliding_attention"])"),
          {"'layer_types'", "'use_sliding_window' is false"});
}

TEST("config: the custom fields of LLaMA-MoE v2 parse and are not runnable") {
  const auto c = parse(family("mixtral", R"("scale_factor":4.0,"num_moe_contract_layers":0,
    "intermediate_size_residual":1792,"attention_bias":false)"));
  for (const char* part : {"scale_factor", "intermediate_size_residual"}) {
    CHECK(c.not_runnable.find(part) != std::string::npos);
  }
  CHECK(c.not_runnable.find("num_moe_contract_layers") == std::string::npos);
  CHECK(parse(family("mixtral", R"("scale_factor":1.0,"intermediate_size_residual":null)"))
            .not_runnable.empty());
}

TEST("config: other families are named together with the supported ones") {
  CHECK_EQ(supported_model_types().size(), 6u);
  refuses<UnsupportedModel>(family("deepseek_v2"), {"'model_type'", "'deepseek_v2'", "olmoe, mix"});
  refuses<UnsupportedModel>(R"({"hidden_size":1})", {"'model_type'", "missing", "phimoe"});
  refuses(R"({"model_type":7})", {"'model_type'", "found 7", "text"});
  refuses<UnsupportedModel>(family("olmoe", R"("hidden_act":"gelu")"), {"'hidden_act'", "'gelu'"});
  refuses<UnsupportedModel>(family("granitemoe", R"("activation_function":"relu")"),
                            {"'activation_function'", "'relu'", "silu"});
  refuses<UnsupportedModel>(family("mixtral", R"("quantization_config":{"bits":4})"),
                            {"'quantization_config'"});
  refuses<UnsupportedModel>(family("mixtral", R"("quantization":{"group_size":64,"bits":4})"),
                            {"'quantization'", "float16"});
}

TEST("config: what is not a number in range is refused by name") {
  for (const char* value : {"0", "-5", "1.5", "\"64\"", "true", "[]", "1048577", "1e400",
                            "18446744073709551615", "99999999999999999999", "NaN", "Infinity"}) {
    refuses(family("olmoe", R"("hidden_size":)" + std::string(value)), {"'hidden_size'"});
  }
  for (const char* value : {"0", "-1e-5", "\"1e-5\"", "NaN", "-Infinity", "1e300", "null1"}) {
    refuses(family("olmoe", R"("rms_norm_eps":)" + std::string(value)), {"'rms_norm_eps'"});
  }
  for (const char* key : {"vocab_size", "num_hidden_layers", "num_attention_heads", "num_experts",
                          "num_experts_per_tok", "intermediate_size", "num_key_value_heads",
                          "max_position_embeddings", "eos_token_id"}) {
    refuses(family("olmoe", message("\"", key, "\":4611686018427387904")),
            {message("'", key, "'"), "4611686018427387904", "expected a whole number"});
  }
  refuses(family("olmoe", R"("tie_word_embeddings":1)"),
          {"'tie_word_embeddings'", "true or false"});
  refuses(family("olmoe", R"("clip_qkv":-8)"), {"'clip_qkv'", "-8"});
}

TEST("config: sizes that contradict each other are refused") {
  refuses(family("mixtral", R"("num_key_value_heads":5)"), {"'num_key_value_heads'", "5", "32"});
  refuses(family("mixtral", R"("num_experts_per_tok":9)"), {"'num_experts_per_tok'", "9", "8"});
  refuses(family("mixtral", R"("head_dim":33)"), {"'head_dim'", "33", "even"});
  refuses(family("mixtral", R"("hidden_size":96)"), {"'head_dim'", "is 3", "hidden_size"});
  refuses(
      family("mixtral", R"("num_attention_heads":65536,"num_key_value_heads":1,"head_dim":128)"),
      {"'num_attention_heads'", "65536 heads of 128"});
}

TEST("config: text that is not a small JSON object is refused") {
  refuses("", {"valid JSON"});
  refuses("[1]", {"array", "object"});
  refuses("{\"model_type\":\"olmoe\"", {"'model_type'", "valid JSON"});
  refuses(std::string("{}\0", 3), {"zero byte"});
  refuses("{\"a\":" + std::string(1000, '['), {"'a'", "levels deep"});
  refuses(family("olmoe", R"("hidden_size":64,"hidden_size":128)"), {"'hidden_size'", "twice"});
  refuses(std::string((16u << 20) + 1, ' '), {"16777217", "at most 16777216"});
  std::string many = "{\"a\":[0";
  for (int i = 0; i < 1'100'000; ++i) many += ",0";
  refuses(many + "]}", {"more than 1000000 values"});
}

TEST("config: load reads a directory, and generation_config.json has the last word on eos") {
  const TempFolder folder;
  CHECK_THROWS(FileError, load_model_config(folder.path() / "none"), "none", "no such directory");
  CHECK_THROWS(FileError, load_model_config(folder.path()), folder.path().string(),
               "not a model directory", "config.json");
  const auto file = folder.write("config.json", family("mixtral", R"("eos_token_id":7)"));
  CHECK_THROWS(FileError, load_model_config(file), "config.json", "not a directory");
  CHECK(load_model_config(folder.path()).eos_token_ids == std::vector<std::int64_t>{7});
  folder.write("generation_config.json", R"({"eos_token_id":null})");
  CHECK(load_model_config(folder.path()).eos_token_ids == std::vector<std::int64_t>{7});
  folder.write("generation_config.json", R"({"eos_token_id":[8,9]})");
  CHECK(load_model_config(folder.path()).eos_token_ids == (std::vector<std::int64_t>{8, 9}));
  folder.write("generation_config.json", R"({"eos_token_id":"x"})");
  CHECK_THROWS(FormatError, load_model_config(folder.path()), "generation_config.json",
               "'eos_token_id'", "'x'");
  folder.write("config.json", "{");
  CHECK_THROWS(FormatError, load_model_config(folder.path()),
               (folder.path() / "config.json").string(), "valid JSON");
}

}  // namespace
}  // namespace moerun
