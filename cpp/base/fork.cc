#include "base/fork.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "base/error.h"

namespace moerun {
namespace {

constexpr auto kMostWait = std::chrono::seconds(2);
constexpr auto kPause = std::chrono::microseconds(100);

std::atomic<std::uint32_t> g_generation{0};
std::atomic<std::uint32_t> g_lost_before{0};  // objects of generations below this are lost
std::atomic<int> g_forks{0};                  // that are under way
std::atomic<int> g_calls{0};
std::atomic<int> g_background{0};
thread_local bool t_finds_use = false;

std::atomic<int>& uses_of(InUse::Kind kind) {
  return kind == InUse::Kind::call ? g_calls : g_background;
}

// InUse() counts itself and then looks for forks; here it is the other way round. So one of the two
// sees the other (sequential consistency), and no use begins between this call and the copy.
void before_fork() {
  g_forks.fetch_add(1);
  const auto end = std::chrono::steady_clock::now() + kMostWait;
  while (g_calls.load() == 0 && g_background.load() != 0 &&
         std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(kPause);
  }
  t_finds_use = g_calls.load() != 0 || g_background.load() != 0;
}

void after_fork_in_parent() { g_forks.fetch_sub(1); }

// The only thread of the child.
void after_fork_in_child() {
  const std::uint32_t generation = g_generation.load() + 1;
  if (t_finds_use) g_lost_before.store(generation);
  g_calls.store(0);
  g_background.store(0);
  g_forks.store(0);
  g_generation.store(generation);
}

[[maybe_unused]] const int g_registered =
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);

constexpr std::string_view kAdvice =
    "; load it in this process, or start processes with the method 'spawn'";

}  // namespace

std::uint32_t fork_generation() noexcept { return g_generation.load(std::memory_order_relaxed); }

InUse::InUse(Kind kind) noexcept : kind_(kind), generation_(fork_generation()) {
  for (;;) {
    uses_of(kind_).fetch_add(1);
    if (g_forks.load() == 0) return;
    uses_of(kind_).fetch_sub(1);
    while (g_forks.load() != 0) std::this_thread::sleep_for(kPause);
  }
}

InUse::~InUse() {
  // The child of a thread that forks in the middle of its use counts from 0.
  if (generation_ == fork_generation()) uses_of(kind_).fetch_sub(1);
}

Origin::Origin() noexcept : generation_(fork_generation()), process_id_(::getpid()) {}

bool Origin::is_lost() const noexcept {
  return generation_ < g_lost_before.load(std::memory_order_relaxed);
}

void Origin::check_usable(std::string_view what) const {
  if (!is_lost()) return;
  throw ForkError(message(what, " was loaded in process ", process_id_,
                          ", which was at work when it forked process ", ::getpid(), kAdvice));
}

void Origin::check_this_process(std::string_view what) const {
  if (is_this_process()) return;
  throw ForkError(message(what, " was loaded in process ", process_id_, ", before the fork of ",
                          "process ", ::getpid(), kAdvice));
}

}  // namespace moerun
