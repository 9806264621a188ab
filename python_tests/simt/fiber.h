// Fibers: stacks that take turns in one host thread. Included by simt.cpp only.
//
// The switch saves what the calling convention of x86-64 lets a function change no matter what, six registers and the
// stack pointer, which takes about 3 ns; other processors use ucontext, which asks the kernel about signals at every
// switch (390 ns). -DSIMT_UCONTEXT chooses it anywhere.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt::detail {

#if defined(SIMT_ASAN)
constexpr size_t kStackBytes = 256 << 10;  // its frames are larger, and so are its reports
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

#if !defined(SIMT_UCONTEXT)
// Pushes the registers, stores the stack pointer in *from, takes the other stack and what was pushed there. A function
// in assembly of its own: the compiler sees a call, after which it trusts no register and no global variable.
extern "C" void simt_switch_stacks(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.pushsection .text
.p2align 4
.hidden simt_switch_stacks
.globl simt_switch_stacks
.type simt_switch_stacks, @function
simt_switch_stacks:
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
.size simt_switch_stacks, .-simt_switch_stacks
.popsection
)");
#endif

// A default Fiber is the host thread's own stack, which is known once it has switched to another.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Gives it a stack, behind a page that nobody may touch: an overflow is a segmentation fault, not a riddle.
  void allocate_stack() {
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
      throw std::runtime_error("no memory for the stacks of a block's threads");
    }
    stack_ = static_cast<unsigned char*>(memory) + guard;
    stack_bytes_ = kStackBytes;
  }

  // The next switch to it enters `entry`, which must not return. Whatever the stack held is forgotten.
  void start(void (*entry)(), size_t colour) {
#if defined(SIMT_ASAN)
    fake_stack_ = nullptr;
#endif
#if defined(SIMT_UCONTEXT)
    static_cast<void>(colour);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = stack_bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    // Stacks begin at different offsets, or they would all fight for the same lines of the cache.
    auto* top = reinterpret_cast<void**>(stack_ + stack_bytes_ - colour % 32 * 128);
    *--top = nullptr;  // where a return address would be: backtraces end here
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - 6;
    for (void** saved = top - 6; saved != top; ++saved) {
      *saved = nullptr;
    }
#endif
  }

  // After a fiber was left in the middle: its frames are gone, and so must be AddressSanitizer's marks around them.
  void forget_frames() {
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(stack_, stack_bytes_);
#endif
  }

  // Leaves this fiber for another; returns when somebody switches back. `for_good` if nobody will.
  void switch_to(Fiber& next, [[maybe_unused]] bool for_good = false) {
#if defined(SIMT_ASAN)
    left_ = this;
    if (for_good) {
      __asan_handle_no_return();  // its last frames, this one too
    }
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, next.stack_, next.stack_bytes_);
#endif
#if defined(SIMT_UCONTEXT)
    swapcontext(&context_, &next.context_);
#else
    simt_switch_stacks(&stack_pointer_, next.stack_pointer_);
#endif
    arrive();
  }

  // To be called on entry too: tells AddressSanitizer which stack this is.
  void arrive() {
#if defined(SIMT_ASAN)
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
    fake_stack_ = nullptr;
    left_->stack_ = static_cast<unsigned char*>(const_cast<void*>(bottom));
    left_->stack_bytes_ = bytes;
#endif
  }

 private:
  unsigned char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
#if defined(SIMT_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(SIMT_ASAN)
  void* fake_stack_ = nullptr;
  static inline Fiber* left_ = nullptr;  // the last one that was left
#endif
};

}  // namespace simt::detail
