// Hostile headers and files: one for every rule of the format.
#include "io/safetensors.h"

#include <sys/stat.h>

#include <cstring>
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

SafetensorsHeader parse(const std::string& json, std::uint64_t data_bytes) {
  return parse_safetensors_header(std::as_bytes(std::span(json)), 8 + json.size() + data_bytes,
                                  "m.safetensors");
}

// The header of one tensor `w`, with these fields.
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"w":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

void refuses(const std::string& json, std::uint64_t data_bytes, std::vector<std::string> parts) {
  parts.push_back("m.safetensors: header: ");
  test::expect_throw<FormatError>(__FILE__, __LINE__, [&] { parse(json, data_bytes); }, parts);
}

std::string bytes_0_to(int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += static_cast<char>(i);
  return out;
}

TEST("safetensors: a header gives tensors in the order of their data, and its metadata") {
  const auto header = parse(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]},)"
      R"("a":{"data_offsets":[0,12],"dtype":"BF16","shape":[2,3]}}   )",
      16);
  CHECK_EQ(header.tensors.size(), 2u);
  CHECK_EQ(header.tensors[0].name, "a");
  CHECK_EQ(header.tensors[0].dtype_name, "BF16");
  CHECK(header.tensors[0].dtype == DType::bf16);
  CHECK(header.tensors[0].shape == (std::vector<std::uint64_t>{2, 3}));
  CHECK_EQ(header.tensors[0].bytes, 12u);
  CHECK_EQ(header.tensors[1].offset, header.tensors[0].offset + 12);
  CHECK_EQ(header.metadata.at("format"), "pt");
}

TEST("safetensors: empty files, scalars, empty tensors and dtypes other than weights' are sized") {
  CHECK(parse("{}", 0).tensors.empty());
  CHECK_EQ(parse(one(R"("F16")", "[]", "[0,2]"), 2).tensors[0].bytes, 2u);
  CHECK_EQ(parse(one(R"("F32")", "[0,18446744073709551615]", "[0,0]"), 0).tensors[0].bytes, 0u);
  CHECK_EQ(parse(one(R"("F4")", "[3,2]", "[0,3]"), 3).tensors[0].bytes, 3u);
  const auto header = parse(one(R"("I64")", "[2]", "[0,16]"), 16);
  CHECK(!header.tensors[0].dtype);
  CHECK_EQ(header.tensors[0].dtype_name, "I64");
}

TEST("safetensors: a header that is not the JSON of an object is refused") {
  refuses("", 0, {"'{'"});
  refuses("[]", 0, {"'['", "'{'"});
  refuses(" {}", 0, {"'{'"});
  refuses("{", 0, {"not valid JSON", "byte"});
  refuses("{}x", 0, {"not valid JSON"});
  refuses(std::string("{}\0x", 4), 0, {"zero byte at offset 2"});
  refuses("{\"\xff\":1}", 0, {"not valid JSON"});
  refuses(R"({"w":{"dtype":"F32","shape":[NaN]}})", 0, {"'w'", "not valid JSON"});
  refuses(R"({"w":)" + std::string(100'000, '['), 0, {"'w'", "found a list"});
}

TEST("safetensors: an entry is exactly dtype, shape and data_offsets") {
  refuses(R"({"w":1})", 0, {"'w'", "the number 1", "{dtype, shape, data_offsets}"});
  refuses(R"({"w":{"dtype":"F32","shape":[]}})", 0, {"'w'", "lacks 'data_offsets'"});
  refuses(R"({"w":{"shape":[],"data_offsets":[0,4]}})", 4, {"'w'", "lacks 'dtype'"});
  refuses(R"({"w":{"dtype":"F32","data_offsets":[0,4]}})", 4, {"'w'", "lacks 'shape'"});
  refuses(R"({"w":{"dtype":"F32","stride":[]}})", 0, {"'w'", "'stride'"});
  refuses(R"({"w":{"dtype":"F32","dtype":"F32"}})", 0, {"'w'", "'dtype'", "twice"});
}

TEST("safetensors: a name given twice is refused") {
  const std::string entry = R"("w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  refuses("{" + entry + "," + entry + "}", 0, {"tensor 'w'", "twice"});
  refuses(R"({"__metadata__":{"a":"b","a":"c"}})", 0, {"'__metadata__'", "'a'", "twice"});
  refuses(R"({"__metadata__":{},"__metadata__":{}})", 0, {"'__metadata__'", "twice"});
}

TEST("safetensors: metadata is text only") {
  refuses(R"({"__metadata__":{"version":1}})", 0, {"'__metadata__'", "'version'", "a string"});
  refuses(R"({"__metadata__":null})", 0, {"'__metadata__'", "null"});
  refuses(R"({"__metadata__":{"a":{"b":"c"}}})", 0, {"'__metadata__'", "'a'", "an object"});
}

TEST("safetensors: dtype and shape are held to the format") {
  refuses(one(R"("F12")", "[]", "[0,4]"), 4, {"'w'", "'dtype'", "'F12'", "BF16"});
  refuses(one("32", "[]", "[0,4]"), 4, {"'w'", "'dtype'", "32"});
  refuses(one(R"("F32")", "4", "[0,4]"), 4, {"'w'", "'shape'", "4"});
  refuses(one(R"("F32")", "[-1]", "[0,4]"), 4, {"'w'", "'shape'", "-1"});
  refuses(one(R"("F32")", "[1.5]", "[0,4]"), 4, {"'w'", "'shape'", "1.5"});
  refuses(one(R"("F32")", "[\"1\"]", "[0,4]"), 4, {"'w'", "'shape'", "'1'"});
  refuses(one(R"("F32")", "[99999999999999999999]", "[0,4]"), 4, {"'w'", "'shape'", "2^64"});
  refuses(one(R"("F32")", "[4294967296,4294967296]", "[0,0]"), 0, {"'w'", "'shape'", "2^64"});
  refuses(one(R"("F4")", "[3]", "[0,2]"), 2, {"'w'", "'shape'", "12 bits"});
  std::string ones = "[1";
  for (int i = 0; i < 100; ++i) ones += ",1";
  refuses(one(R"("F32")", ones + "]", "[0,4]"), 4, {"'w'", "'shape'", "64 dimensions"});
}

TEST("safetensors: offsets that lie about size, order or the file's end are refused") {
  refuses(one(R"("F32")", "[1]", "[0,8]"), 8, {"'w'", "[0, 8]", "expected 4", "[1]"});
  refuses(one(R"("F32")", "[1]", "[4,0]"), 4, {"'w'", "[4, 0]", "before they begin"});
  refuses(one(R"("F32")", "[1]", "[0]"), 4, {"'w'", "'data_offsets'", "1 of them"});
  refuses(one(R"("F32")", "[1]", "[0,4,8]"), 4, {"'w'", "'data_offsets'", "the number 8"});
  refuses(one(R"("F32")", "[1]", "[0,-4]"), 4, {"'w'", "'data_offsets'", "-4"});
  refuses(one(R"("F32")", "[2]", "[0,8]"), 4, {"'w'", "[0, 8]", "4 bytes of data"});
  refuses(one(R"("F32")", "[1]", "[4,8]"), 8, {"'w'", "[4, 8]", "gap", "begin at 0"});
  refuses(one(R"("F32")", "[1]", "[0,4]"), 9, {"end at byte 4", "at 9"});
  refuses("{}", 1, {"end at byte 0", "at 1"});
}

TEST("safetensors: tensors that overlap are refused") {
  refuses(R"({"v":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},)"
          R"("w":{"dtype":"F16","shape":[2],"data_offsets":[2,6]}})",
          6, {"'w'", "[2, 6]", "overlap tensor 'v'", "begin at 4"});
}

TEST("safetensors: long and unprintable names do not spoil messages") {
  refuses(R"({"\n\u0000)" + std::string(5000, 'x') + R"(":1})", 0, {"'\\x0a\\x00xx", "..."});
}

TEST("safetensors: an opened file finds, reads and maps its tensors") {
  const TempFolder folder;
  const std::string data = bytes_0_to(24);
  const auto path =
      folder.write("m.safetensors",
                   safetensors_bytes(R"({"b":{"dtype":"U8","shape":[12],"data_offsets":[12,24]},)"
                                     R"("a":{"dtype":"U8","shape":[3,4],"data_offsets":[0,12]}})",
                                     data));
  SafetensorsFile opened = SafetensorsFile::open(path);
  const TensorInfo* before = opened.find("b");
  const SafetensorsFile file = std::move(opened);
  CHECK(file.find("b") == before);
  CHECK(file.find("c") == nullptr);
  CHECK_EQ(file.path(), path);
  CHECK_EQ(file.file_size(), std::filesystem::file_size(path));

  std::vector<std::byte> read(12);
  file.read_at(file.find("b")->offset, read);
  CHECK(std::memcmp(read.data(), data.data() + 12, 12) == 0);
  const ConstBytes mapped = file.map();
  CHECK_EQ(mapped.size(), file.file_size());
  CHECK(std::memcmp(mapped.data() + file.find("a")->offset, data.data(), 24) == 0);
  CHECK(file.map().data() == mapped.data());
  CHECK_THROWS(InvalidArgument, file.read_at(file.file_size() - 4, read), "m.safetensors", "12");
}

TEST("safetensors: rows are scattered, also more of them than one system call takes") {
  constexpr std::size_t kRows = 2500;
  constexpr std::size_t kRowBytes = 5;
  constexpr std::size_t kStride = 8;
  const TempFolder folder;
  std::string data;
  for (std::size_t i = 0; i < kRows * kRowBytes; ++i) data += static_cast<char>(i % 251);
  const auto file = SafetensorsFile::open(
      folder.write("m.safetensors",
                   safetensors_bytes(
                       R"({"w":{"dtype":"U8","shape":[2500,5],"data_offsets":[0,12500]}})", data)));
  const std::uint64_t offset = file.find("w")->offset;
  std::vector<std::byte> out(kRows * kStride, std::byte{0xee});
  file.read_rows_at(offset, kRowBytes, kRows, out.data(), kStride);
  for (std::size_t r = 0; r < kRows; ++r) {
    CHECK(std::memcmp(&out[r * kStride], &data[r * kRowBytes], kRowBytes) == 0);
    CHECK(out[r * kStride + kRowBytes] == std::byte{0xee});
  }
  file.read_rows_at(offset, kRowBytes, kRows, out.data(), kRowBytes);
  CHECK(std::memcmp(out.data(), data.data(), data.size()) == 0);
  CHECK_THROWS(InvalidArgument, file.read_rows_at(offset, kRowBytes, kRows + 1, out.data(), 8),
               "m.safetensors");
  CHECK_THROWS(InvalidArgument, file.read_rows_at(offset, kRowBytes, kRows, out.data(), 4),
               "stride");
  CHECK_THROWS(InvalidArgument, file.read_rows_at(offset, 1u << 31, SIZE_MAX, out.data(), SIZE_MAX),
               "rows");
}

TEST("safetensors: a file that shrinks while it is open is noticed") {
  const TempFolder folder;
  const auto path = folder.write(
      "m.safetensors", safetensors_bytes(one(R"("U8")", "[16]", "[0,16]"), bytes_0_to(16)));
  const auto file = SafetensorsFile::open(path);
  const std::uint64_t offset = file.find("w")->offset;
  std::filesystem::resize_file(path, offset + 6);
  std::vector<std::byte> read(32);
  CHECK_THROWS(FileError, file.read_at(offset, std::span(read).first(16)), "m.safetensors",
               message("offset ", offset + 6), "shrank");
  CHECK_THROWS(FileError, file.read_rows_at(offset, 4, 4, read.data(), 8), "m.safetensors",
               message("offset ", offset + 6), "shrank");
}

TEST("safetensors: a header length beyond the file or the limit takes no memory") {
  const TempFolder folder;
  const auto open = [&](const std::string& bytes) {
    return SafetensorsFile::open(folder.write("m.safetensors", bytes));
  };
  CHECK_THROWS(FormatError, open(""), "m.safetensors", "0 bytes", "at least");
  CHECK_THROWS(FormatError, open("1234567"), "7 bytes", "cut off");
  CHECK_THROWS(FormatError, open(safetensors_bytes("{}", "", 3)), "length of 3", "the 2 that");
  CHECK_THROWS(FormatError, open(safetensors_bytes("{}", "", UINT64_MAX)), "18446744073709551615");
  CHECK_THROWS(FormatError, open(safetensors_bytes("{}", "", 100'000'001)), "100000000");
  // A sparse file makes the length true, and still too long.
  const auto path = folder.write("m.safetensors", safetensors_bytes("{}", "", 100'000'001));
  std::filesystem::resize_file(path, 200'000'000);
  CHECK_THROWS(FormatError, SafetensorsFile::open(path), "100000001", "at most 100000000");
}

TEST("safetensors: only regular files are opened") {
  const TempFolder folder;
  CHECK_THROWS(FileError, SafetensorsFile::open(folder.path() / "none.safetensors"),
               "none.safetensors", "no such file");
  CHECK_THROWS(FileError, SafetensorsFile::open(folder.path()), "a directory", "regular file");
  CHECK_THROWS(FileError, SafetensorsFile::open("/dev/zero"), "/dev/zero", "a device");
  const auto pipe = folder.path() / "pipe";
  CHECK_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  CHECK_THROWS(FileError, SafetensorsFile::open(pipe), "a pipe");
}

}  // namespace
}  // namespace moerun
