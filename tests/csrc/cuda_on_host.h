// The subset of the CUDA language that the kernels use, for running them on the host: slowly, one block after
// another, and always in the same order.
//
// The threads of a block are coroutines with separate stacks in a single system thread. Each of them runs up
// to a barrier, and then the next one does, so a missing barrier causes wrong results. On request, blocks and
// threads run in the opposite order, which reveals errors that one order hides.
#ifndef KERAS_DAS_TESTS_CSRC_CUDA_ON_HOST_H_
#define KERAS_DAS_TESTS_CSRC_CUDA_ON_HOST_H_

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

namespace cuda_on_host {

struct Index {
  unsigned x = 0;
};
inline Index block_index, block_size, grid_size, thread_index;

inline bool backwards = false;

constexpr int kMostThreads = 1024, kWarp = 32, kStackBytes = 128 << 10, kSharedBytes = 48 << 10;
alignas(16) inline unsigned char dynamic_shared[kSharedBytes];

// The threads of one block.
class Block {
 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  void run(int threads, const std::function<void()>& kernel) {
    if (threads > kMostThreads || threads % kWarp) std::abort();
    kernel_ = &kernel;
    count_ = threads;
    while (static_cast<int>(threads_.size()) < threads) add_thread();
    for (int i = 0; i < threads; ++i)
      threads_[i]->state = kReady, threads_[i]->shows = threads_[i]->votes = 0;
    for (bool& yes : yes_) yes = false;
    const int warps = threads / kWarp;
    for (int done = 0; done < threads;) {
      bool moved = false;
      // Each warp runs as far as possible before the next one, so that warps are as far apart as possible.
      for (int i = 0; i < warps; ++i) {
        while (run_warp((backwards ? warps - 1 - i : i) * kWarp, &done)) moved = true;
      }
      release(0, threads, kAtBlock);
      if (!moved) std::abort();  // a deadlock, also on a GPU
    }
  }

  void wait_for_block() { wait(kAtBlock); }

  void wait_for_warp() { wait(kAtWarp); }

  // Shows `value` to the warp. Returns a function from a lane to its value, which is valid until the second
  // call after this one.
  template <class A>
  auto publish(const A& value) {
    const int self = current_, parity = threads_[self]->shows++ & 1;
    static_assert(sizeof value <= sizeof threads_[self]->slot[parity], "the slot is large enough");
    std::memcpy(threads_[self]->slot[parity], &value, sizeof value);
    wait(kAtWarp);
    return [this, first = self - self % kWarp, parity](int lane) {
      A shown;
      std::memcpy(&shown, threads_[first + lane]->slot[parity], sizeof shown);
      return shown;
    };
  }

  // Waits for the block, and returns whether any of its threads voted yes.
  bool vote(bool yes) {
    const int turn = threads_[current_]->votes++ % 3;
    yes_[(turn + 1) % 3] = false;  // all threads have read the previous value
    yes_[turn] |= yes;
    wait_for_block();
    return yes_[turn];
  }

 private:
  enum State { kReady, kAtWarp, kAtBlock, kDone };
  struct Thread {
    int index = 0, shows = 0, votes = 0;
    State state = kReady;
    bool started = false;
    jmp_buf here;
    ucontext_t start;
    std::unique_ptr<unsigned char[]> stack;
    unsigned char slot[2][32];
  };

  void add_thread() {
    threads_.push_back(std::make_unique<Thread>());
    Thread& thread = *threads_.back();
    thread.index = static_cast<int>(threads_.size()) - 1;
    thread.stack.reset(new unsigned char[kStackBytes]);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, live, 0);
  }

  // Runs the threads of a warp up to their next barrier. Returns whether any thread could run.
  bool run_warp(int first, int* done) {
    bool moved = false;
    for (int i = 0; i < kWarp; ++i) {
      Thread& thread = *threads_[first + (backwards ? kWarp - 1 - i : i)];
      if (thread.state != kReady) continue;
      moved = true;
      resume(&thread);
      *done += thread.state == kDone;
    }
    release(first, kWarp, kAtWarp);
    return moved;
  }

  // The main function of a thread: one block after another.
  static void live() {
    for (;;) {
      (*instance().kernel_)();
      instance().wait(kDone);
    }
  }

  // Contexts are entered once. After that, threads switch by jumps, which require no system calls.
  void resume(Thread* thread) {
    current_ = thread->index;
    thread_index.x = static_cast<unsigned>(thread->index);
    if (_setjmp(scheduler_)) return;
    if (thread->started) _longjmp(thread->here, 1);
    thread->started = true;
    setcontext(&thread->start);
  }

  void wait(State state) {
    Thread& thread = *threads_[current_];
    thread.state = state;
    if (!_setjmp(thread.here)) _longjmp(scheduler_, 1);
  }

  // Resumes the threads if all that have not ended are waiting at the same barrier.
  void release(int first, int count, State state) {
    for (int i = first; i < first + count; ++i) {
      if (threads_[i]->state != state && threads_[i]->state != kDone) return;
    }
    for (int i = first; i < first + count; ++i) {
      if (threads_[i]->state == state) threads_[i]->state = kReady;
    }
  }

  const std::function<void()>* kernel_ = nullptr;
  int count_ = 0, current_ = 0;
  bool yes_[3] = {};
  std::vector<std::unique_ptr<Thread>> threads_;
  jmp_buf scheduler_;
};

inline void launch(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > kSharedBytes) std::abort();
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    std::memset(dynamic_shared, 0xff, sizeof dynamic_shared);  // NaN
    block_index.x = static_cast<unsigned>(backwards ? blocks - 1 - block : block);
    Block::instance().run(threads, kernel);
  }
}

}  // namespace cuda_on_host

#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_size
#define gridDim cuda_on_host::grid_size
#define threadIdx cuda_on_host::thread_index

inline void __syncthreads() { cuda_on_host::Block::instance().wait_for_block(); }
inline bool __syncthreads_or(bool yes) { return cuda_on_host::Block::instance().vote(yes); }

template <class A>
A __shfl_xor_sync(unsigned, A value, int lane_mask) {
  const int lane = threadIdx.x % cuda_on_host::kWarp;
  return cuda_on_host::Block::instance().publish(value)(lane ^ lane_mask);
}

template <class A>
A atomicAdd(A* to, A value) {
  const A before = *to;
  *to += value;
  return before;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The product of a warp, 16 rows by 8 columns, distributed among its threads as on a GPU; see
// cuda/tensor_cores.h. Aborts if an operand has more digits than TF32, because the result on a GPU is
// undefined.
inline void multiply_tf32(float (&sums)[4], const float (&left)[4], const float (&right)[2]) {
  struct Operands {
    float left[4], right[2];
  } own;
  for (int e = 0; e < 4; ++e) own.left[e] = left[e];
  for (int e = 0; e < 2; ++e) own.right[e] = right[e];
  for (const float* number = own.left; number < own.left + 6; ++number) {
    if (bits_of(*number) & 0x1fff) std::abort();
  }
  cuda_on_host::Block& block = cuda_on_host::Block::instance();
  const auto of_lane = block.publish(own);
  const int lane = threadIdx.x % cuda_on_host::kWarp;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 8; ++k) {
      sums[e] +=
          of_lane(row % 8 * 4 + k % 4).left[row / 8 + k / 4 * 2] * of_lane(column * 4 + k % 4).right[k / 4];
    }
  }
}

#endif  // KERAS_DAS_TESTS_CSRC_CUDA_ON_HOST_H_
