// The fingerprint of a checkpoint: the same for the same tensors, another one for any other.
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "io/checkpoint.h"
#include "io/checkpoint_fingerprint.h"
#include "temp_folder.h"

namespace moerun::test {
namespace {

namespace fs = std::filesystem;

struct Tensor {
  std::string name;
  std::string dtype;
  std::vector<std::size_t> shape;
  std::string data;
};

std::string file_of(const std::vector<Tensor>& tensors) {
  std::string header;
  std::string data;
  for (const Tensor& each : tensors) {
    std::string shape;
    for (const std::size_t n : each.shape) shape += (shape.empty() ? "" : ",") + std::to_string(n);
    header += (header.empty() ? "{\"" : ",\"") + each.name + R"(":{"dtype":")" + each.dtype +
              R"(","shape":[)" + shape + R"(],"data_offsets":[)" + std::to_string(data.size()) +
              "," + std::to_string(data.size() + each.data.size()) + "]}";
    data += each.data;
  }
  return safetensors_bytes(header + "}", data);
}

CheckpointFingerprint of_single(const std::vector<Tensor>& tensors) {
  const TempFolder temp;
  temp.write("model.safetensors", file_of(tensors));
  return fingerprint_of(Checkpoint::open(temp.path()));
}

CheckpointFingerprint of_shards(const std::vector<std::vector<Tensor>>& shards) {
  const TempFolder temp;
  std::string map;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = "part-" + std::to_string(i) + ".safetensors";
    temp.write(name, file_of(shards[i]));
    for (const Tensor& each : shards[i]) {
      map += (map.empty() ? "\"" : ",\"") + each.name + R"(":")" + name + "\"";
    }
  }
  temp.write("model.safetensors.index.json", R"({"weight_map":{)" + map + "}}");
  return fingerprint_of(Checkpoint::open(temp.path()));
}

std::string bytes(std::size_t size, unsigned seed) {
  std::string data(size, '\0');
  for (char& c : data) c = static_cast<char>((seed = seed * 1664525u + 1013904223u) >> 24);
  return data;
}

const Tensor kSmall{"a.weight", "F32", {4, 8}, bytes(128, 1)};
const Tensor kLarge{"b.weight", "BF16", {1024, 2048}, bytes(std::size_t{4} << 20, 2)};
const Tensor kFused{"c.experts", "BF16", {8, 256, 128}, bytes(std::size_t{512} << 10, 3)};

}  // namespace

TEST("a fingerprint does not depend on which shard holds a tensor, or on the order there") {
  const auto one = of_single({kSmall, kLarge, kFused});
  for (const auto& other :
       {of_single({kFused, kSmall, kLarge}), of_shards({{kLarge}, {kSmall, kFused}}),
        of_shards({{kSmall}, {kLarge}, {kFused}})}) {
    CHECK_EQ(other.headers, one.headers);
    CHECK_EQ(other.contents, one.contents);
  }
  CHECK_EQ(one.contents.size(), std::size_t{16});
}

TEST("a fingerprint notices a bit in any tensor, and in any expert of a fused one") {
  const auto one = of_single({kSmall, kLarge, kFused});
  const auto with_bit = [&](Tensor changed, std::size_t place) {
    changed.data[place] = static_cast<char>(changed.data[place] ^ 0x80);  // a sign
    std::vector<Tensor> tensors = {kSmall, kLarge, kFused};
    for (Tensor& each : tensors) {
      if (each.name == changed.name) each = changed;
    }
    const auto found = of_single(tensors);
    CHECK_EQ(found.headers, one.headers);
    CHECK(found.contents != one.contents);
  };
  for (const std::size_t place : {std::size_t{0}, std::size_t{63}, std::size_t{127}}) {
    with_bit(kSmall, place);
  }
  for (const std::size_t place : {std::size_t{1}, kLarge.data.size() / 2, kLarge.data.size() - 1}) {
    with_bit(kLarge, place);
  }
  // All of an expert changes when it is trained.
  const std::size_t expert = kFused.data.size() / 8;
  for (std::size_t e = 0; e < 8; ++e) {
    std::vector<Tensor> tensors = {kSmall, kLarge, kFused};
    for (std::size_t i = 0; i < expert; i += 2) tensors[2].data[e * expert + i] ^= 1;
    CHECK(of_single(tensors).contents != one.contents);
  }
}

TEST("a fingerprint notices changes that cancel out in a sum or an exclusive or") {
  const auto one = of_single({kSmall});
  Tensor swapped = kSmall;
  std::swap(swapped.data[0], swapped.data[8]);
  Tensor signs = kSmall;
  for (const std::size_t place : {std::size_t{7}, std::size_t{15}}) {
    signs.data[place] = static_cast<char>(signs.data[place] ^ 0x80);
  }
  CHECK(of_single({swapped}).contents != one.contents);
  CHECK(of_single({signs}).contents != one.contents);
}

TEST("names, types and shapes are part of both hashes of a fingerprint") {
  const auto one = of_single({kSmall});
  for (const Tensor& other : {Tensor{"x.weight", "F32", {4, 8}, kSmall.data},
                              Tensor{"a.weight", "BF16", {8, 8}, kSmall.data},
                              Tensor{"a.weight", "F32", {8, 4}, kSmall.data},
                              Tensor{"a.weight", "I32", {4, 8}, kSmall.data}}) {
    const auto found = of_single({other});
    CHECK(found.headers != one.headers);
    CHECK(found.contents != one.contents);
  }
}

TEST("a tensor without elements or of odd extents has a fingerprint too") {
  const auto found = of_single(
      {{"empty", "F32", {0, 8}, ""}, {"deep", "U8", {64, 64, 64, 1, 1}, bytes(262144, 4)}});
  CHECK_EQ(found.contents.size(), std::size_t{16});
}

}  // namespace moerun::test
