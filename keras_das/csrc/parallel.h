// Runs tasks on the threads of the caller's pool.
#ifndef KERAS_DAS_CSRC_PARALLEL_H_
#define KERAS_DAS_CSRC_PARALLEL_H_

#include <cstdint>
#include <functional>

namespace keras_das {

// A pool of threads, provided by TensorFlow, XLA or JAX.
struct Workers {
  // The number of threads that may work at the same time, including the calling one.
  int64_t threads = 1;
  // Passes a closure to the pool, which may run it at any later time. Not called if `threads` is 1.
  std::function<void(std::function<void()>)> schedule;
};

// Calls `task(context, index)` for each index below `count`, in any order and in parallel, and returns when
// all calls have returned. The calling thread works, too, so there is no deadlock if the pool is busy or if
// one of its threads calls this. If a task throws std::bad_alloc, the only exception that tasks may throw,
// this function throws it when all tasks have ended. `task` is a function pointer, so that code for different
// instruction sets shares no inline functions.
void parallel_for(const Workers& workers, int64_t count, void (*task)(void* context, int64_t index),
                  void* context);

}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_PARALLEL_H_
