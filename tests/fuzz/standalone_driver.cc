// For compilers without libFuzzer: runs every file of the given folders, then random mutations of
// them until the time is up. Knows -max_total_time=SECONDS and -seed=NUMBER, ignores other flags.
// An input that crashes, or takes longer than ten seconds, is left in ./crash-input.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Input = std::vector<std::uint8_t>;

constexpr std::size_t kMaxBytes = 1 << 16;
constexpr unsigned kTimeoutSeconds = 10;

const Input* current = nullptr;

// Called while dying: system calls only.
void save_current() {
  if (current == nullptr) return;
  const int fd = ::open("crash-input", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0 || ::write(fd, current->data(), current->size()) < 0) return;
  ::close(fd);
  constexpr char kSaved[] = "the input was saved as ./crash-input\n";
  if (::write(STDERR_FILENO, kSaved, sizeof kSaved - 1) < 0) return;
}

void on_signal(int signal) {
  save_current();
  ::_exit(128 + signal);
}

void run(const Input& input) {
  current = &input;
  ::alarm(kTimeoutSeconds);
  LLVMFuzzerTestOneInput(input.data(), input.size());
  ::alarm(0);
  current = nullptr;
}

void read_inputs(const std::filesystem::path& path, std::vector<Input>& inputs) {
  if (std::filesystem::is_directory(path)) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path)) {
      if (entry.is_regular_file()) read_inputs(entry.path(), inputs);
    }
    return;
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::cerr << path.string() << ": cannot be read\n";
    std::exit(2);
  }
  inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  Input operator()(const std::vector<Input>& corpus) {
    Input input = corpus[below(corpus.size())];
    for (std::size_t i = 1 + below(6); i > 0; --i) mutate(input, corpus);
    if (input.size() > kMaxBytes) input.resize(kMaxBytes);
    return input;
  }

 private:
  std::size_t below(std::size_t end) { return end == 0 ? 0 : random_() % end; }

  void mutate(Input& input, const std::vector<Input>& corpus) {
    static const std::string kTokens[] = {"0",
                                          "-1",
                                          "1e999",
                                          "18446744073709551615",
                                          "9223372036854775808",
                                          "null",
                                          "true",
                                          "{",
                                          "}",
                                          "[",
                                          "]",
                                          "\"",
                                          ",",
                                          ":",
                                          "{}",
                                          "[]",
                                          "\"\"",
                                          "NaN",
                                          "\\u0000",
                                          "\\ud800",
                                          "__metadata__"};
    const std::size_t at = below(input.size() + 1);
    const auto place = input.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(6)) {
      case 0:  // one byte
        if (at < input.size()) input[at] = static_cast<std::uint8_t>(random_());
        break;
      case 1:  // one bit
        if (at < input.size()) input[at] ^= static_cast<std::uint8_t>(1u << below(8));
        break;
      case 2: {  // drop a piece
        const std::size_t count = below(std::min<std::size_t>(input.size() - at, 32) + 1);
        input.erase(place, place + static_cast<std::ptrdiff_t>(count));
        break;
      }
      case 3: {  // a word of JSON, over what is there or between
        const std::string& token = kTokens[below(std::size(kTokens))];
        if (below(2) == 0 && input.size() - at >= token.size()) {
          std::copy(token.begin(), token.end(), place);
        } else {
          input.insert(place, token.begin(), token.end());
        }
        break;
      }
      case 4: {  // a piece of another input
        const Input& other = corpus[below(corpus.size())];
        const std::size_t from = below(other.size() + 1);
        const std::size_t count = below(std::min<std::size_t>(other.size() - from, 256) + 1);
        const auto first = other.begin() + static_cast<std::ptrdiff_t>(from);
        input.insert(place, first, first + static_cast<std::ptrdiff_t>(count));
        break;
      }
      default:  // a digit, as numbers decide most here
        for (std::size_t i = at; i < input.size(); ++i) {
          if (input[i] >= '0' && input[i] <= '9') {
            input[i] = static_cast<std::uint8_t>('0' + below(10));
            break;
          }
        }
    }
  }

  std::mt19937_64 random_;
};

}  // namespace

int main(int argc, char** argv) {
  double max_seconds = 10.0;
  std::uint64_t seed = std::random_device()();
  std::vector<Input> corpus;
  for (const std::string& argument : std::vector<std::string>(argv + 1, argv + argc)) {
    const auto value = argument.substr(argument.find('=') + 1);
    if (argument.starts_with("-max_total_time=")) {
      max_seconds = std::stod(value);
    } else if (argument.starts_with("-seed=")) {
      seed = std::stoull(value);
    } else if (!argument.starts_with("-")) {
      read_inputs(argument, corpus);
    }
  }
  corpus.emplace_back();
  ::signal(SIGALRM, on_signal);
  ::signal(SIGABRT, on_signal);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(save_current);

  std::cout << "seed " << seed << ", " << corpus.size() << " inputs\n";
  for (const Input& input : corpus) run(input);
  Mutator mutate(seed);
  const auto start = std::chrono::steady_clock::now();
  std::uint64_t num_runs = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
         max_seconds) {
    for (int i = 0; i < 100; ++i, ++num_runs) {
      const Input input = mutate(corpus);
      run(input);
    }
  }
  std::cout << num_runs << " mutated inputs, no crash\n";
  return 0;
}
