// A function with a stack of its own, which can stop in the middle and go on later. All fibres of
// an OS thread take turns on it; none runs beside another.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>

namespace moerun::cuda_host {

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The next resume() begins to run it. Any run before must have ended.
  void start(std::function<void()> body);
  // Runs it until it calls pause() or ends. Rethrows what ended it.
  void resume();
  // Called inside: goes back to resume().
  void pause();
  bool has_ended() const { return has_ended_; }

 private:
  struct Context;  // the machine's part

  [[noreturn]] static void enter(Fibre* self);
  void check_stack() const;

  std::unique_ptr<Context> context_;
  std::function<void()> body_;
  std::exception_ptr failure_;
  bool has_ended_ = true;
};

}  // namespace moerun::cuda_host
