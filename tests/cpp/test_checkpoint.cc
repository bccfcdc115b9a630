#include "io/checkpoint.h"

#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "temp_folder.h"

namespace moerun {
namespace {

using test::safetensors_bytes;
using test::TempFolder;

constexpr const char* kIndex = "model.safetensors.index.json";

// One tensor of four bytes: F32 [1].
std::string file_with(const std::string& tensor, const std::string& dtype = "F32") {
  return safetensors_bytes(
      "{\"" + tensor + R"(":{"dtype":")" + dtype + R"(","shape":[1],"data_offsets":[0,4]}})",
      "abcd");
}

std::string index_of(const std::string& map) { return R"({"weight_map":{)" + map + "}}"; }

TEST("checkpoint: one file") {
  const TempFolder folder;
  folder.write("model.safetensors", file_with("w"));
  Checkpoint opened = Checkpoint::open(folder.path());
  const Checkpoint checkpoint = std::move(opened);
  CHECK_EQ(checkpoint.total_bytes(), 4u);
  CHECK(checkpoint.names() == std::vector<std::string>{"w"});
  const TensorRef w = checkpoint.require("w", {1});
  CHECK_EQ(w.info->name, "w");
  CHECK_EQ(w.file->path().filename(), "model.safetensors");
  CHECK(checkpoint.find("v") == nullptr);
}

TEST("checkpoint: shards are found through the index") {
  const TempFolder folder;
  folder.write("a.safetensors", file_with("v"));
  folder.write("b.safetensors", file_with("w"));
  folder.write(kIndex, index_of(R"("v":"a.safetensors","w":"b.safetensors")"));
  const auto checkpoint = Checkpoint::open(folder.path());
  CHECK(checkpoint.names() == (std::vector<std::string>{"v", "w"}));
  CHECK_EQ(checkpoint.find("w")->file->path().filename(), "b.safetensors");
  CHECK_EQ(checkpoint.files().size(), 2u);
}

TEST("checkpoint: a missing tensor, a wrong shape and a wrong dtype name file and tensor") {
  const TempFolder folder;
  folder.write("model.safetensors", file_with("model.norm.weight"));
  const auto checkpoint = Checkpoint::open(folder.path());
  CHECK_THROWS(FormatError, checkpoint.require("model.norm.bias", {1, 2}), folder.path().string(),
               "'model.norm.bias'", "missing", "[1, 2]", "1 tensors", "'model.norm.weight'");
  CHECK_THROWS(FormatError, checkpoint.require("model.norm.weight", {2, 3}), "model.safetensors",
               "'model.norm.weight'", "found shape [1]", "expected [2, 3]");
  folder.write("model.safetensors", file_with("w", "I32"));
  CHECK_THROWS(FormatError, Checkpoint::open(folder.path()).require("w", {1}), "model.safetensors",
               "'w'", "I32", "F32, F16 or BF16");
}

TEST("checkpoint: a directory without safetensors says what it has instead") {
  const TempFolder folder;
  CHECK_THROWS(FileError, Checkpoint::open(folder.path() / "none"), "none", "no such directory");
  CHECK_THROWS(FileError, Checkpoint::open(folder.path()), folder.path().string(),
               "model.safetensors", kIndex);
  folder.write("pytorch_model.bin", "x");
  CHECK_THROWS(FileError, Checkpoint::open(folder.path()), "'pytorch_model.bin'",
               "only safetensors");
  folder.write("model-00001-of-00002.safetensors", "x");
  CHECK_THROWS(FileError, Checkpoint::open(folder.path()), "'model-00001-of-00002.safetensors'",
               "no index");
  CHECK_THROWS(FileError, Checkpoint::open(folder.path() / "pytorch_model.bin"),
               "is not a directory");
  std::filesystem::create_symlink("nowhere", folder.path() / "model.safetensors");
  CHECK_THROWS(FileError, Checkpoint::open(folder.path()), "model.safetensors", "no such file");
}

TEST("checkpoint: an index that does not fit its shards is refused") {
  const TempFolder folder;
  const auto open_with = [&](const std::string& index) {
    folder.write(kIndex, index);
    return Checkpoint::open(folder.path());
  };
  folder.write("a.safetensors", file_with("v"));
  folder.write("b.safetensors", file_with("v"));
  CHECK_THROWS(FileError, open_with(index_of(R"("v":"a.safetensors","w":"c.safetensors")")), kIndex,
               "'c.safetensors'", "'w'", "no such file");
  CHECK_THROWS(FormatError, open_with(index_of(R"("w":"a.safetensors")")), kIndex, "'w'",
               "not in 'a.safetensors'");
}

TEST("checkpoint: of a tensor in two shards the index says which is read") {
  const TempFolder folder;
  const auto shard = [](const std::string& data) {
    return safetensors_bytes(R"({"v":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                             data);
  };
  folder.write("a.safetensors", shard("ab"));
  folder.write("b.safetensors", shard("cd"));
  const auto byte_of = [](const Checkpoint& checkpoint, const char* name) {
    const TensorRef* tensor = checkpoint.find(name);
    std::byte byte{};
    tensor->file->read_at(tensor->info->offset, {&byte, 1});
    return static_cast<char>(byte);
  };
  for (const bool swaps : {false, true}) {
    folder.write(kIndex, swaps ? index_of(R"("v":"b.safetensors","w":"a.safetensors")")
                               : index_of(R"("v":"a.safetensors","w":"b.safetensors")"));
    const auto checkpoint = Checkpoint::open(folder.path());
    CHECK_EQ(byte_of(checkpoint, "v"), swaps ? 'c' : 'a');
    CHECK_EQ(byte_of(checkpoint, "w"), swaps ? 'b' : 'd');
    CHECK(checkpoint.names() == (std::vector<std::string>{"v", "w"}));
    CHECK_EQ(checkpoint.total_bytes(), 2u);
  }
}

TEST("checkpoint: a tensor in two shards that the index does not name is refused") {
  const TempFolder folder;
  for (const char* name : {"a.safetensors", "b.safetensors"}) {
    folder.write(name,
                 safetensors_bytes(R"({"v":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                   R"("w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},)"
                                   R"(")" +
                                       std::string(name, 1) +
                                       R"(":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                                   "abc"));
  }
  folder.write(kIndex, index_of(R"("v":"a.safetensors","b":"b.safetensors")"));
  CHECK_THROWS(FormatError, Checkpoint::open(folder.path()), kIndex, "'w'", "two shards",
               "'a.safetensors'", "'b.safetensors'", "'weight_map'");
  // One that a single shard has is read from there.
  folder.write(kIndex, index_of(R"("v":"a.safetensors","w":"b.safetensors")"));
  CHECK(Checkpoint::open(folder.path()).names() == (std::vector<std::string>{"a", "b", "v", "w"}));
}

TEST("checkpoint: shards may lie in folders below the directory, and behind links") {
  const TempFolder folder;
  const TempFolder blobs;
  std::filesystem::create_directories(folder.path() / "sub" / "deep");
  folder.write("sub/deep/a.safetensors", file_with("v"));
  blobs.write("0123abcd", file_with("w"));
  std::filesystem::create_symlink(blobs.path() / "0123abcd", folder.path() / "sub" / "b");
  folder.write(kIndex, index_of(R"("v":"sub/deep/a.safetensors","w":"sub/b")"));
  const auto checkpoint = Checkpoint::open(folder.path());
  CHECK(checkpoint.names() == (std::vector<std::string>{"v", "w"}));
  CHECK_EQ(checkpoint.find("v")->file->path(), folder.path() / "sub" / "deep" / "a.safetensors");
}

TEST("checkpoint: the index is an object of names of files in the directory or below") {
  const TempFolder folder;
  const auto open_with = [&](const std::string& index) {
    folder.write(kIndex, index);
    return Checkpoint::open(folder.path());
  };
  CHECK_THROWS(FormatError, open_with("[]"), kIndex, "an object");
  CHECK_THROWS(FormatError, open_with("{}"), kIndex, "'weight_map'", "none");
  CHECK_THROWS(FormatError, open_with(R"({"weight_map":[]})"), kIndex, "'weight_map'", "array");
  CHECK_THROWS(FormatError, open_with(index_of("")), kIndex, "'weight_map'");
  CHECK_THROWS(FormatError, open_with(index_of(R"("w":1)")), kIndex, "'w'", "number");
  for (const char* name : {"../a.safetensors", "/etc/passwd", "..", ".", "", "a/../../b", "a/..",
                           "a//b", "a/", "./a", "a\\\\b", "sub/a\\\\b"}) {
    CHECK_THROWS(FormatError, open_with(index_of(R"("w":")" + std::string(name) + "\"")), kIndex,
                 "'w'", "or in a folder below it");
  }
  CHECK_THROWS(FormatError, open_with(index_of(R"("w":"a\u0000b")")), kIndex,
               "or in a folder below it");
  CHECK_THROWS(FormatError, open_with(index_of(R"("w":"a","w":"b")")), kIndex, "'w'", "twice");
  CHECK_THROWS(FormatError, open_with(R"({"weight_map":)"), kIndex, "'weight_map'", "valid JSON");
}

}  // namespace
}  // namespace moerun
