// Runs numbered tasks on threads that somebody else owns.
#ifndef KERAS_DAS_CSRC_PARALLEL_H_
#define KERAS_DAS_CSRC_PARALLEL_H_

#include <cstdint>
#include <functional>

namespace keras_das {

// A pool of threads, as TensorFlow, XLA and JAX each lend one.
struct Workers {
  // How many threads may work at once, the calling one included.
  int64_t threads = 1;
  // Hands a closure to the pool, which may run it at any later time. Not called if `threads` is 1.
  std::function<void(std::function<void()>)> schedule;
};

// Calls `task(context, index)` for index 0 to `count - 1`, in any order and at once where there are threads, and returns when all have
// returned. The calling thread works too, so a pool that is busy, or whose own thread calls this, cannot stall it.
// A task's exception is thrown again here, when all tasks have ended.
// (A function pointer, so that kernels compiled for other instruction sets share no inline code with the rest.)
void parallel_for(const Workers& workers, int64_t count, void (*task)(void* context, int64_t index), void* context);

}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_PARALLEL_H_
