// Record files: the same bits, resumed, refused when they are not what they should be.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert/record_file.h"
#include "model/generation.h"
#include "model/model.h"
#include "temp_folder.h"

namespace moerun::test {
namespace {

namespace fs = std::filesystem;

const char* const kModel = MOERUN_TEST_MODEL;

std::vector<std::uint64_t> hashes(const ModelOptions& options, const fs::path& path = kModel) {
  const auto model = Model::load(path, options);
  std::vector<std::uint64_t> result;
  Generation generation(model, {1, 2, 3, 4, 5}, {{}, 8, {}});
  while (generation.next()) result.push_back(generation.stats().logits_hash);
  return result;
}

ModelOptions packed(const fs::path& folder, double split = 0.4) {
  ModelOptions options;
  options.experts.budget = "30%";
  options.experts.split = {split};
  options.experts.pack_folder = folder.string();
  return options;
}

fs::path copy_of_model(const fs::path& folder) {
  fs::create_directories(folder);
  for (const auto& entry : fs::directory_iterator(kModel)) {
    fs::copy(entry.path(), folder / entry.path().filename(), fs::copy_options::recursive);
  }
  return folder;
}

void change_last_byte(const fs::path& path) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekg(-1, std::ios::end);
  const char byte = static_cast<char>(file.get() ^ 1);
  file.seekp(-1, std::ios::end);
  file.put(byte);
}

fs::path only_file(const fs::path& folder) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder)) found.push_back(entry.path());
  CHECK_EQ(found.size(), std::size_t{1});
  return found.front();
}

}  // namespace

TEST("a model that reads a record file has the same bits, whatever the split") {
  const TempFolder temp;
  const auto reference = hashes({});
  for (const double split : {0.0, 0.3, 1.0}) {
    CHECK(hashes(packed(temp.path() / "packs", split)) == reference);
  }
  only_file(temp.path() / "packs");  // written once
}

TEST("with a record file a segment costs its own bytes") {
  const TempFolder temp;
  const auto bytes_of = [&](ModelOptions options) {
    options.experts.policy = "lru";
    options.experts.prefetch = "off";
    const auto model = Model::load(kModel, options);
    Generation generation(model, {1, 2, 3, 4, 5}, {{}, 20, {}});
    while (generation.next()) {
    }
    std::uint64_t bytes = 0;
    for (const auto& layer : model->expert_cache()->stats().layers) bytes += layer.demand_bytes;
    return bytes;
  };
  const std::uint64_t from_record_file = bytes_of(packed(temp.path()));
  ModelOptions unpacked = packed(temp.path());
  unpacked.experts.pack_folder = "";
  CHECK(from_record_file < bytes_of(unpacked));
}

TEST("writing a record file goes on where it was interrupted") {
  const TempFolder temp;
  const auto reference = hashes({});
  const ModelPlan plan = plan_model(kModel, {});
  const RecordFileLayout layout(*plan.weights, kModel);
  std::uint64_t stopped_at = 0;
  const auto stop = [&](std::uint64_t done, std::uint64_t total) {
    stopped_at = done;
    if (done > total / 2) throw Interrupted("stop");
  };
  CHECK_THROWS(Interrupted, write_record_file(*plan.weights, layout, temp.path(), stop), "stop");
  CHECK(only_file(temp.path()).extension() == ".partial");
  std::uint64_t first_done = 0;
  write_record_file(*plan.weights, layout, temp.path(), [&](std::uint64_t done, std::uint64_t) {
    if (first_done == 0) first_done = done;
  });
  CHECK(first_done > stopped_at);
  CHECK(only_file(temp.path()) == layout.path_in(temp.path()));
  CHECK_EQ(fs::file_size(layout.path_in(temp.path())), layout.file_bytes());
  CHECK(hashes(packed(temp.path())) == reference);
}

TEST("a record file that was damaged is refused, a partial one of another kind is written over") {
  const TempFolder temp;
  const ModelPlan plan = plan_model(kModel, {});
  const RecordFileLayout layout(*plan.weights, kModel);
  const fs::path path = layout.path_in(temp.path());
  std::ofstream(path.string() + ".partial") << "something else entirely";
  write_record_file(*plan.weights, layout, temp.path(), {});
  fs::resize_file(path, layout.file_bytes() - 1);
  CHECK_THROWS(FormatError, hashes(packed(temp.path())), path.filename().string(), "remove it");
  fs::resize_file(path, layout.file_bytes());
  std::fstream(path, std::ios::in | std::ios::out) << "x";
  CHECK_THROWS(FormatError, hashes(packed(temp.path())), path.filename().string());
}

TEST("record files of a model are removed, others stay") {
  const TempFolder temp;
  const ModelPlan plan = plan_model(kModel, {});
  const RecordFileLayout layout(*plan.weights, kModel);
  write_record_file(*plan.weights, layout, temp.path(), {});
  std::ofstream(temp.path() / "notes.records") << "mine";
  const auto removed = remove_record_files(kModel, temp.path());
  CHECK_EQ(removed.size(), std::size_t{1});
  CHECK_EQ(removed.front().bytes, layout.file_bytes());
  CHECK(removed.front().path == layout.path_in(temp.path()));
  CHECK(only_file(temp.path()).filename() == "notes.records");
  CHECK(remove_record_files(kModel, temp.path()).empty());
  CHECK(remove_record_files(kModel, temp.path() / "nowhere").empty());
}

TEST("weights of the same size and time are other weights, and their old record file goes") {
  const TempFolder temp;
  const fs::path model = copy_of_model(temp.path() / "model");
  hashes(packed(temp.path() / "packs"), model);
  const fs::path before = only_file(temp.path() / "packs");
  const fs::path weights = model / "model.safetensors";
  const auto time = fs::last_write_time(weights);
  change_last_byte(weights);
  fs::last_write_time(weights, time);
  CHECK(hashes(packed(temp.path() / "packs"), model) == hashes({}, model));
  const fs::path after = only_file(temp.path() / "packs");
  CHECK(after != before);
}

TEST("the record file of a model that was moved or copied is used again") {
  const TempFolder temp;
  const fs::path model = copy_of_model(temp.path() / "model");
  hashes(packed(temp.path() / "packs"), model);
  const fs::path file = only_file(temp.path() / "packs");
  const auto time = fs::last_write_time(file);
  fs::rename(model, temp.path() / "other");
  hashes(packed(temp.path() / "packs"), temp.path() / "other");
  CHECK(fs::last_write_time(only_file(temp.path() / "packs")) == time);
  CHECK_EQ(remove_record_files(temp.path() / "other", temp.path() / "packs").size(),
           std::size_t{1});
}

TEST("a record file has no path in it and a short name, whatever the model's folder is called") {
  for (const std::string& name : {std::string(250, 'a'), std::string("caf\xe9 \xff")}) {
    const TempFolder temp;
    const fs::path model = copy_of_model(temp.path() / name);
    CHECK(hashes(packed(temp.path() / "packs"), model) == hashes({}));
    const fs::path file = only_file(temp.path() / "packs");
    CHECK(file.filename().string().size() < 128);
    std::string head(4096, '\0');
    std::ifstream(file, std::ios::binary).read(head.data(), 4096);
    CHECK(head.find(temp.path().string()) == std::string::npos);
    CHECK(head.find('/') == std::string::npos);
  }
}

TEST("a record file of version 1 that was written for this folder is removed with the new one") {
  const TempFolder temp;
  const std::string folder = fs::canonical(kModel).string();
  const auto old = temp.write("tiny-olmoe-0123456789abcdef.records",
                              R"({"format":"moerun-records","version":1,"model":")" + folder +
                                  R"(","key":"0123456789abcdef"})");
  const auto others = temp.write("other-0123456789abcdef.records",
                                 R"({"format":"moerun-records","version":1,"model":"/other"})");
  const ModelPlan plan = plan_model(kModel, {});
  const RecordFileLayout layout(*plan.weights, kModel);
  const auto removed = write_record_file(*plan.weights, layout, temp.path(), {});
  CHECK_EQ(removed.size(), std::size_t{1});
  CHECK(removed.front().path == old);
  CHECK(!fs::exists(old));
  CHECK(fs::exists(others));
}

TEST("a folder that cannot be written to is named") {
  const TempFolder temp;
  std::ofstream(temp.path() / "file") << "x";
  CHECK_THROWS(FileError, hashes(packed(temp.path() / "file" / "folder")), "file");
}

}  // namespace moerun::test
