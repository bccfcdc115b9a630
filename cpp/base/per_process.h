// A part of an object that a forked process has to make anew: threads, and what they lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "base/fork.h"

namespace moerun {

// The destructor destroys the part of this process. The part of a parent is left in memory on
// purpose: its threads cannot be joined, and a condition variable with waiters not be destroyed.
template <typename Part>
class PerProcess {
 public:
  explicit PerProcess(std::unique_ptr<Part> part) : node_(new Node{std::move(part)}) {}
  ~PerProcess() {
    Node* node = node_.load();
    if (node->origin.is_this_process()) {
      delete node;
    } else {
      node->part.release();
      delete node;
    }
  }
  PerProcess(const PerProcess&) = delete;
  PerProcess& operator=(const PerProcess&) = delete;

  // make(parents_part) is called once in a forked process, and returns a std::unique_ptr<Part>.
  // Any thread may call; if several do at once, the first result stays. Locks of the parent's part
  // may be held by threads that do not exist.
  template <typename Make>
  Part& get(const Make& make) {
    Node* node = node_.load(std::memory_order_acquire);
    if (node->origin.is_this_process()) return *node->part;
    auto fresh = std::make_unique<Node>(Node{make(*node->part)});
    if (node_.compare_exchange_strong(node, fresh.get(), std::memory_order_acq_rel)) {
      return *fresh.release()->part;  // and the parent's node stays
    }
    return *node->part;
  }

 private:
  struct Node {
    std::unique_ptr<Part> part;
    Origin origin{};
  };
  std::atomic<Node*> node_;
};

}  // namespace moerun
