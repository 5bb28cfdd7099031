// As much of CUDA's language as deformable_conv2d.cu.cc uses, for running its kernels on the host: slowly, one block
// after another, always in the same order. For tests alone.
//
// The threads of a block are coroutines on stacks of their own, all on one thread of the system. Each runs until it
// comes to a barrier, and then the next one does; so a barrier that is missing shows as wrong numbers. On demand blocks
// and threads run in the opposite order, for mistakes that one order hides.
#ifndef KERAS_DAS_CSRC_CUDA_ON_HOST_H_
#define KERAS_DAS_CSRC_CUDA_ON_HOST_H_

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

// One block's threads.
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
    for (int i = 0; i < threads; ++i) threads_[i]->state = kReady, threads_[i]->shuffles = 0;
    const int warps = threads / kWarp;
    for (int done = 0; done < threads;) {
      bool moved = false;
      // A warp runs as far as it comes, and then the next one: apart as far as they may be.
      for (int i = 0; i < warps; ++i) {
        while (run_warp((backwards ? warps - 1 - i : i) * kWarp, &done)) moved = true;
      }
      release(0, threads, kAtBlock);
      if (!moved) std::abort();  // some wait for others that have ended: a deadlock on a GPU too
    }
  }

  void wait_for_block() { wait(kAtBlock); }

  void wait_for_warp() { wait(kAtWarp); }

  // `value` of the thread in the same warp whose index differs by `lane_mask`.
  template <class A>
  A exchange(A value, int lane_mask) {
    const int self = current_, parity = threads_[self]->shuffles++ & 1;
    std::memcpy(threads_[self]->slot[parity], &value, sizeof value);
    wait(kAtWarp);
    std::memcpy(&value, threads_[self ^ lane_mask]->slot[parity], sizeof value);
    return value;
  }

 private:
  enum State { kReady, kAtWarp, kAtBlock, kDone };
  struct Thread {
    int index = 0, shuffles = 0;
    State state = kReady;
    bool started = false;
    jmp_buf here;
    ucontext_t start;
    std::unique_ptr<unsigned char[]> stack;
    unsigned char slot[2][8];
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

  // Runs a warp's threads to their next barrier. Returns whether there was one to run.
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

  // A thread's whole life: one block after another.
  static void live() {
    for (;;) {
      (*instance().kernel_)();
      instance().wait(kDone);
    }
  }

  // Contexts are entered once, and then left and entered by jumps, which make no system calls.
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

  // Lets threads go on if all that have not ended wait at the same barrier.
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

template <class A>
A __shfl_xor_sync(unsigned, A value, int lane_mask) {
  return cuda_on_host::Block::instance().exchange(value, lane_mask);
}

template <class A>
A atomicAdd(A* to, A value) {
  const A before = *to;
  *to += value;
  return before;
}

// Matrix products of a warp: 16x16 sums over 8 products each of TF32 numbers. Each thread has the operands whole and 8
// of the sums, which is no layout of a GPU's; nor may code rely on one.
namespace nvcuda::wmma {

enum layout_t { mem_row_major, mem_col_major };
struct row_major;
struct col_major;
struct matrix_a;
struct matrix_b;
struct accumulator;
namespace precision {
struct tf32;
}

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr int num_elements = 16 * 8;  // matrix_a: (rows, 8); matrix_b: (8, columns)
  float x[num_elements];
};
template <>
struct fragment<accumulator, 16, 16, 8, float> {
  static constexpr int num_elements = 8;
  float x[num_elements];
};
using Accumulator = fragment<accumulator, 16, 16, 8, float>;

inline float __float_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;  // to the nearest, a half away from 0
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits |= 0x400000u;  // a NaN stays one
  bits &= ~0x1fffu;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Aborts on what a GPU leaves undefined: addresses and strides that are not aligned, and operands of more digits.
inline void check_memory(const float* memory, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(memory) % 32 || stride % 4) std::abort();
  cuda_on_host::Block::instance().wait_for_warp();
}
inline float checked(float operand) {
  const float rounded = __float_to_tf32(operand);
  if (std::memcmp(&rounded, &operand, 4)) std::abort();
  return operand;
}

inline void load_matrix_sync(fragment<matrix_a, 16, 16, 8, precision::tf32, col_major>& to, const float* from,
                             unsigned stride) {
  check_memory(from, stride);
  for (int i = 0; i < 16 * 8; ++i) to.x[i] = checked(from[i % 8 * stride + i / 8]);
}
inline void load_matrix_sync(fragment<matrix_b, 16, 16, 8, precision::tf32, row_major>& to, const float* from,
                             unsigned stride) {
  check_memory(from, stride);
  for (int i = 0; i < 8 * 16; ++i) to.x[i] = checked(from[i / 16 * stride + i % 16]);
}

inline void fill_fragment(Accumulator& sums, float value) {
  for (float& sum : sums.x) sum = value;
}

inline void mma_sync(Accumulator& to, const fragment<matrix_a, 16, 16, 8, precision::tf32, col_major>& left,
                     const fragment<matrix_b, 16, 16, 8, precision::tf32, row_major>& right, const Accumulator& from) {
  cuda_on_host::Block::instance().wait_for_warp();
  const int lane = threadIdx.x % cuda_on_host::kWarp;
  for (int i = 0; i < 8; ++i) {
    const int row = lane / 2, column = lane % 2 * 8 + i;
    to.x[i] = from.x[i];
    for (int k = 0; k < 8; ++k) to.x[i] += left.x[row * 8 + k] * right.x[k * 16 + column];
  }
}

inline void store_matrix_sync(float* to, const Accumulator& sums, unsigned stride, layout_t layout) {
  if (layout != mem_row_major) std::abort();
  check_memory(to, stride);
  const int lane = threadIdx.x % cuda_on_host::kWarp;
  for (int i = 0; i < 8; ++i) to[lane / 2 * stride + lane % 2 * 8 + i] = sums.x[i];
}

}  // namespace nvcuda::wmma

#endif  // KERAS_DAS_CSRC_CUDA_ON_HOST_H_
