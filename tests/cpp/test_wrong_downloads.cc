// Files that were not downloaded, and weights in a format that is not read: the cause is named.
#include <string>

#include "base/error.h"
#include "check.h"
#include "io/checkpoint.h"
#include "temp_folder.h"
#include "weights/model_config.h"

namespace moerun {
namespace {

using test::safetensors_bytes;
using test::TempFolder;

const std::string kPointer =
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d4d\nsize 4949453792\n";

TEST("a git-lfs pointer in place of weights, an index or a config is called one") {
  const TempFolder folder;
  folder.write("model.safetensors", kPointer);
  CHECK_THROWS(FormatError, Checkpoint::open(folder.path()), "model.safetensors", "git-lfs pointer",
               "4.61 GiB", "git lfs pull");
  const TempFolder sharded;
  sharded.write("model.safetensors.index.json", kPointer);
  CHECK_THROWS(FormatError, Checkpoint::open(sharded.path()), "index.json", "git-lfs pointer");
  folder.write("config.json", "version https://git-lfs.github.com/spec/v1\n");
  CHECK_THROWS(FormatError, load_model_config(folder.path()), "config.json", "git-lfs pointer",
               "the file itself was not");
}

TEST("tensors of quantised weights are named where the wanted ones are missing") {
  const auto one = [](const std::string& name) {
    return safetensors_bytes(
        "{\"" + name + R"(":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}})", "abcd");
  };
  const TempFolder folder;
  for (const auto& [name, format] :
       {std::pair{"q_proj.qweight", "GPTQ"}, std::pair{"q_proj.scales", "MLX"},
        std::pair{"q_proj.weight_scale_inv", "FP8"}}) {
    folder.write("model.safetensors", one(name));
    const auto checkpoint = Checkpoint::open(folder.path());
    CHECK_THROWS(UnsupportedModel, checkpoint.require("q_proj.weight", {8, 8}), name, format,
                 "quantised", "float16");
    CHECK_THROWS(UnsupportedModel, checkpoint.require(name, {8, 8}), format);
  }
}

}  // namespace
}  // namespace moerun
