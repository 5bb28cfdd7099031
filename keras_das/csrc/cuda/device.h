// Memory and launches of one call.
#ifndef KERAS_DAS_CSRC_CUDA_DEVICE_H_
#define KERAS_DAS_CSRC_CUDA_DEVICE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/platform.h"
#include "deformable_conv2d_cuda.h"

namespace keras_das {
namespace cuda {
namespace {

// The resources of a call. The functions throw std::runtime_error.
class Device {
 public:
  explicit Device(const CudaCall& call) : call_(call) {}

  bool deterministic() const { return call_.deterministic; }
  int64_t workspace_bytes() const { return call_.workspace_bytes; }

  template <class E>
  E* allocate(int64_t count) const {
    void* memory = call_.allocate(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(E)));
    if (memory == nullptr) {
      throw std::runtime_error("out of memory: there is none for the kernels' working copies");
    }
    return static_cast<E*>(memory);
  }

  template <class E>
  void zero(E* memory, int64_t count) const {
    if (count == 0) return;
    const size_t bytes = static_cast<size_t>(count) * sizeof(E);
#if defined(__CUDACC__)
    check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(call_.stream)));
#else
    std::memset(static_cast<void*>(memory), 0, bytes);
#endif
  }

  // Starts a kernel that loops over the work of `blocks` blocks.
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t blocks, const Arguments& arguments, int threads = kThreads,
              int64_t shared_bytes = 0) const {
    blocks = std::min(blocks, call_.most_blocks);
    if (blocks == 0) return;
#if defined(__CUDACC__)
    const auto stream = static_cast<cudaStream_t>(call_.stream);
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments);
    check(cudaGetLastError());
#else
    cuda_on_host::launch(blocks, threads, shared_bytes, [&] { kernel(arguments); });
#endif
  }

 private:
#if defined(__CUDACC__)
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
#endif

  const CudaCall& call_;
};

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_DEVICE_H_
