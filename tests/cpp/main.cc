#include <algorithm>
#include <exception>
#include <iostream>

#include "check.h"

namespace moerun::test {

std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

}  // namespace moerun::test

int main(int argc, char** argv) {
  auto& tests = moerun::test::registry();
  std::sort(tests.begin(), tests.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  const std::vector<std::string> names(argv + 1, argv + argc);
  if (names == std::vector<std::string>{"--list"}) {
    for (const auto& test : tests) std::cout << test.name << "\n";
    return 0;
  }
  int num_run = 0;
  int num_failed = 0;
  for (const auto& test : tests) {
    if (!names.empty() && std::find(names.begin(), names.end(), test.name) == names.end()) continue;
    ++num_run;
    try {
      test.body();
    } catch (const std::exception& error) {
      ++num_failed;
      std::cerr << "FAILED " << test.name << "\n  " << error.what() << "\n";
    }
  }
  std::cout << num_run - num_failed << " of " << num_run << " tests passed\n";
  return num_failed == 0 && num_run > 0 ? 0 : 1;
}
