// The objects of a parent in a forked process: fork() copies memory, but of all threads only the
// one that calls it. An object is usable in the child if nothing changed it during the fork.
#pragma once

#include <cstdint>
#include <string_view>

namespace moerun {

// Forks between the first process that loaded the library and this one.
std::uint32_t fork_generation() noexcept;

// While one lives, its thread may change objects that outlive the call. If a fork finds one, the
// child must not use the parent's objects. A fork keeps new ones waiting until it is over.
class InUse {
 public:
  enum class Kind {
    call,        // ends when a caller says so: a fork does not wait for it
    background,  // ends by itself: a fork waits for it, up to two seconds
  };
  explicit InUse(Kind kind = Kind::call) noexcept;
  ~InUse();
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  Kind kind_;
  std::uint32_t generation_;
};

// The process that made an object.
class Origin {
 public:
  Origin() noexcept;
  bool is_this_process() const noexcept { return generation_ == fork_generation(); }
  // Whether a fork since then found an InUse: locks may be held by threads that do not exist here,
  // and even a destructor may wait for ever. Such an object is left in memory.
  bool is_lost() const noexcept;
  // ForkError if is_lost(); `what` names the object, say "the model".
  void check_usable(std::string_view what) const;
  // ForkError in every process but the one that made the object.
  void check_this_process(std::string_view what) const;

 private:
  std::uint32_t generation_;
  int process_id_;
};

// For owners of objects with is_lost(): such a one is left in memory.
struct DeleteUnlessLost {
  template <typename T>
  void operator()(T* object) const noexcept {
    const InUse in_use;
    if (!object->is_lost()) delete object;
  }
};

}  // namespace moerun
