// Plain C functions that call the kernels without any framework, for `make sanitize` and the tests of the
// kernels.
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "deformable_conv2d.h"
#if defined(KERAS_DAS_CUDA)
#include "cuda_on_host.h"
#include "deformable_conv2d_cuda.h"
#endif

namespace {

// A pool of threads for one call.
class Pool {
 public:
  explicit Pool(int64_t threads) {
    for (int64_t i = 1; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void schedule(std::function<void()> closure) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closures_.push_back(std::move(closure));
    }
    wake_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return closing_ || !closures_.empty(); });
      if (closures_.empty()) return;
      std::function<void()> closure = std::move(closures_.front());
      closures_.pop_front();
      lock.unlock();
      closure();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> closures_;
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

int report(const std::string& problem, char* message, int64_t size) {
  std::strncpy(message, problem.c_str(), static_cast<size_t>(size));
  message[size - 1] = 0;
  return problem.empty() ? 0 : 1;
}

#if defined(KERAS_DAS_CUDA)
// A call of the CUDA kernels on the host. The working memory is initialized with NaN and followed by a guard
// that detects writes out of bounds.
class HostCall {
 public:
  explicit HostCall(const int64_t* options) {
    call.deterministic = options[0];
    call.workspace_bytes = options[1];
    call.most_blocks = options[2];
    cuda_on_host::backwards = options[3];
    call.allocate = [this, most = options[4]](int64_t bytes) -> void* {
      if (bytes > most) return nullptr;
      memory_.emplace_back((bytes + kGuard) / 16 + 1, Line{{kFill, kFill}});
      sizes_.push_back(bytes);
      return memory_.back().data();
    };
  }

  // Returns the size of the allocated working memory, or -1 if there was a write out of bounds.
  int64_t finish() const {
    int64_t total = 0;
    for (size_t i = 0; i < memory_.size(); ++i) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(memory_[i].data());
      for (int64_t at = sizes_[i]; at < sizes_[i] + kGuard; ++at) {
        if (bytes[at] != 0xff) return -1;
      }
      total += sizes_[i];
    }
    return total;
  }

  keras_das::CudaCall call;

 private:
  struct alignas(16) Line {
    int64_t words[2];
  };
  static constexpr int64_t kGuard = 256, kFill = -1;
  std::deque<std::vector<Line>> memory_;
  std::vector<int64_t> sizes_;
};
#endif

}  // namespace

extern "C" {

// `settings`: strides and dilations (rows, columns), same (0 or 1), padding (top, bottom, left, right), and
// offset groups. `sizes` receives the height and width of the output. Returns 0, or 1 with the error in
// `message`.
int keras_das_geometry(const int64_t* inputs, const int64_t* kernel, const int64_t* settings, int64_t* sizes,
                       keras_das::Geometry* geometry, char* message, int64_t message_size) {
  keras_das::Settings s;
  for (int axis = 0; axis < 2; ++axis) s.stride[axis] = settings[axis], s.dilation[axis] = settings[2 + axis];
  s.same = settings[4];
  for (int side = 0; side < 4; ++side) s.padding[side] = settings[5 + side];
  s.offset_groups = settings[9];
  const std::string problem = keras_das::make_geometry(inputs, kernel, s, geometry);
  if (problem.empty()) sizes[0] = geometry->out_height, sizes[1] = geometry->out_width;
  return report(problem, message, message_size);
}

int64_t keras_das_geometry_size() { return sizeof(keras_das::Geometry); }

// Both functions: `dtype` as in `keras_das::DType`, `buffers` in the order of the structures in
// deformable_conv2d.h. They return 0, or 1 if they run out of memory.
int keras_das_forward(int dtype, const keras_das::Geometry* geometry, void* const* buffers, int64_t threads) {
  Pool pool(threads);
  const keras_das::Workers workers{threads, [&](std::function<void()> f) { pool.schedule(std::move(f)); }};
  const keras_das::ForwardBuffers b{buffers[0], buffers[1], buffers[2], buffers[3], buffers[4], buffers[5]};
  return !keras_das::forward(static_cast<keras_das::DType>(dtype), *geometry, b, workers).empty();
}

int keras_das_backward(int dtype, const keras_das::Geometry* geometry, void* const* buffers,
                       int64_t threads) {
  Pool pool(threads);
  const keras_das::Workers workers{threads, [&](std::function<void()> f) { pool.schedule(std::move(f)); }};
  const keras_das::BackwardBuffers b{buffers[0], buffers[1], buffers[2], buffers[3], buffers[4],
                                     buffers[5], buffers[6], buffers[7], buffers[8], buffers[9]};
  return !keras_das::backward(static_cast<keras_das::DType>(dtype), *geometry, b, workers).empty();
}

#if defined(KERAS_DAS_CUDA)
// The same with the CUDA kernels. `options`: deterministic (0 or 1), bytes of working memory, maximum number
// of blocks, backwards (0 or 1), and the largest allocation in bytes. Both functions return the size of the
// allocated working memory, or -1 with the error in `message`.
int64_t keras_das_cuda_forward(int dtype, const keras_das::Geometry* geometry, void* const* buffers,
                               const int64_t* options, char* message, int64_t message_size) {
  HostCall host(options);
  const keras_das::ForwardBuffers b{buffers[0], buffers[1], buffers[2], buffers[3], buffers[4], buffers[5]};
  const std::string problem =
      keras_das::cuda_forward(static_cast<keras_das::DType>(dtype), *geometry, b, host.call);
  if (report(problem, message, message_size)) return -1;
  return host.finish();
}

int64_t keras_das_cuda_backward(int dtype, const keras_das::Geometry* geometry, void* const* buffers,
                                const int64_t* options, char* message, int64_t message_size) {
  HostCall host(options);
  const keras_das::BackwardBuffers b{buffers[0], buffers[1], buffers[2], buffers[3], buffers[4],
                                     buffers[5], buffers[6], buffers[7], buffers[8], buffers[9]};
  const std::string problem =
      keras_das::cuda_backward(static_cast<keras_das::DType>(dtype), *geometry, b, host.call);
  if (report(problem, message, message_size)) return -1;
  return host.finish();
}
#endif

}  // extern "C"
