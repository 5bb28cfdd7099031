#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>

namespace keras_das {
namespace {

// Outlives `parallel_for`: the pool may run a closure after all tasks are done, which then finds none left.
struct Progress {
  void (*task)(void* context, int64_t index);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::atomic<bool> out_of_memory{false};
  std::mutex mutex;
  std::condition_variable all_done;

  void work() {
    for (int64_t index; (index = next.fetch_add(1)) < count;) {
      try {
        task(context, index);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
      if (done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_all();
      }
    }
  }
};

}  // namespace

void parallel_for(const Workers& workers, int64_t count, void (*task)(void* context, int64_t index),
                  void* context) {
  const int64_t helpers = std::min(workers.threads, count) - 1;
  if (helpers <= 0) {
    for (int64_t index = 0; index < count; ++index) task(context, index);
    return;
  }
  auto progress = std::make_shared<Progress>();
  progress->task = task;
  progress->context = context;
  progress->count = count;
  try {
    for (int64_t i = 0; i < helpers; ++i) workers.schedule([progress] { progress->work(); });
  } catch (const std::bad_alloc&) {
    // The helpers that have started and this thread do all tasks. They still use `context`: do not unwind
    // here.
  }
  progress->work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done.load() == count; });
  if (progress->out_of_memory) throw std::bad_alloc();
}

}  // namespace keras_das
