#include "host/fibre.h"

#include <cstdint>
#include <cstring>
#include <utility>

#include "base/error.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace moerun::cuda_host {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
// At the far end of the stack: overwritten by a frame that does not fit.
constexpr std::size_t kCanaryBytes = 64;
constexpr unsigned char kCanary = 0xc5;

}  // namespace

#if defined(__x86_64__)

// Saves what a call must preserve on the old stack and takes it from the new one. swapcontext would
// do, but it asks the kernel for the signal mask twice: 0.5 us instead of 5 ns, and a kernel of a
// small model switches a million times.
extern "C" void moerun_switch_stack(void** save_here, void* go_there);
// Where a new stack begins: calls the function in r12 with what is in rbx.
extern "C" void moerun_begin_fibre();
asm(R"(
  .text
  .globl moerun_switch_stack
  .hidden moerun_switch_stack
  .type moerun_switch_stack, @function
moerun_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size moerun_switch_stack, . - moerun_switch_stack

  .globl moerun_begin_fibre
  .hidden moerun_begin_fibre
  .type moerun_begin_fibre, @function
moerun_begin_fibre:
  movq %rbx, %rdi
  call *%r12
  ud2
  .size moerun_begin_fibre, . - moerun_begin_fibre
)");

#endif

struct Fibre::Context {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
#if defined(__x86_64__)
  void* own = nullptr;
  void* caller = nullptr;
#else
  ucontext_t own{};
  ucontext_t caller{};
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* own_fake_stack = nullptr;
  void* caller_fake_stack = nullptr;
  const void* caller_stack = nullptr;
  std::size_t caller_stack_bytes = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* own_state = nullptr;
  void* caller_state = nullptr;
#endif

  void switch_to_own() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&caller_fake_stack, stack.get(), kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
    caller_state = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(own_state, 0);
#endif
#if defined(__x86_64__)
    moerun_switch_stack(&caller, own);
#else
    swapcontext(&caller, &own);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(caller_fake_stack, nullptr, nullptr);
#endif
  }

  // `for_good`: this stack will not run again until it is started anew.
  void switch_to_caller([[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &own_fake_stack, caller_stack,
                                   caller_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(caller_state, 0);
#endif
#if defined(__x86_64__)
    moerun_switch_stack(&own, caller);
#else
    swapcontext(&own, &caller);
#endif
    arrived();
  }

  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own_fake_stack, &caller_stack, &caller_stack_bytes);
#endif
  }
};

Fibre::Fibre() : context_(std::make_unique<Context>()) {
  std::memset(context_->stack.get(), kCanary, kCanaryBytes);
#if defined(__SANITIZE_THREAD__)
  context_->own_state = __tsan_create_fiber(0);
#endif
}

Fibre::~Fibre() {
#if defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(context_->own_state);
#endif
}

void Fibre::start(std::function<void()> body) {
  body_ = std::move(body);
  has_ended_ = false;
  failure_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  context_->own_fake_stack = nullptr;
  // The frames of the run before never returned.
  __asan_unpoison_memory_region(context_->stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  // As if moerun_begin_fibre had called moerun_switch_stack.
  const auto top =
      reinterpret_cast<std::uintptr_t>(context_->stack.get() + kStackBytes) & ~std::uintptr_t{15};
  auto* frame = reinterpret_cast<std::uintptr_t*>(top);
  *--frame = reinterpret_cast<std::uintptr_t>(&moerun_begin_fibre);
  *--frame = 0;                                         // rbp
  *--frame = reinterpret_cast<std::uintptr_t>(this);    // rbx
  *--frame = reinterpret_cast<std::uintptr_t>(&enter);  // r12
  for (int i = 0; i < 3; ++i) *--frame = 0;             // r13 to r15
  context_->own = frame;
#else
  getcontext(&context_->own);
  context_->own.uc_stack.ss_sp = context_->stack.get();
  context_->own.uc_stack.ss_size = kStackBytes;
  context_->own.uc_link = nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&context_->own, reinterpret_cast<void (*)()>(+[](unsigned high, unsigned low) {
    enter(reinterpret_cast<Fibre*>(static_cast<std::uintptr_t>(high) << 32 | low));
  }),
              2, static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
#endif
}

void Fibre::enter(Fibre* self) {
  self->context_->arrived();
  try {
    self->body_();
  } catch (...) {
    self->failure_ = std::current_exception();
  }
  self->has_ended_ = true;
  self->context_->switch_to_caller(/*for_good=*/true);
  std::terminate();  // nobody resumes what has ended
}

void Fibre::resume() {
  context_->switch_to_own();
  check_stack();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Fibre::pause() { context_->switch_to_caller(/*for_good=*/false); }

void Fibre::check_stack() const {
  for (std::size_t i = 0; i < kCanaryBytes; ++i) {
    if (context_->stack[i] != kCanary) {
      throw Error(message("a thread of a kernel needs more than ", kStackBytes, " bytes of stack"));
    }
  }
}

}  // namespace moerun::cuda_host
