// A plain C function that calls the CUDA kernels on a GPU without any framework, for cuda_on_gpu.py. It
// copies host tensors with the memory around them to the GPU and back.
#include <cuda_runtime.h>

#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "deformable_conv2d.h"
#include "deformable_conv2d_cuda.h"

namespace {

constexpr int64_t kGuard = 256, kAlignment = 64;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Device memory that is freed with its owner.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes(bytes) { check(cudaMalloc(&start_, static_cast<size_t>(bytes))); }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(start_); }
  char* start() const { return static_cast<char*>(start_); }
  const int64_t bytes;

 private:
  void* start_ = nullptr;
};

// A copy of host memory on the GPU, at the same address modulo `kAlignment`.
class Copy {
 public:
  Copy(void* host, int64_t bytes) : host_(host), bytes_(bytes), memory_(bytes + kAlignment) {
    const auto address = [](const void* at) { return reinterpret_cast<uintptr_t>(at); };
    start = memory_.start() + (address(host) - address(memory_.start())) % kAlignment;
    check(cudaMemcpy(start, host_, static_cast<size_t>(bytes_), cudaMemcpyHostToDevice));
  }
  void bring_back() const {
    check(cudaMemcpy(host_, start, static_cast<size_t>(bytes_), cudaMemcpyDeviceToHost));
  }
  char* start;

 private:
  void* host_;
  int64_t bytes_;
  Memory memory_;
};

// The working memory is initialized with NaN and followed by a guard that detects writes out of bounds.
class DeviceCall {
 public:
  explicit DeviceCall(const int64_t* options) {
    call.deterministic = options[0];
    call.workspace_bytes = options[1];
    call.most_blocks = options[2];
    call.allocate = [this](int64_t bytes) -> void* {
      memory_.emplace_back(bytes + kGuard);
      check(cudaMemset(memory_.back().start(), 0xff, static_cast<size_t>(bytes + kGuard)));
      return memory_.back().start();
    };
  }

  // Returns the size of the allocated working memory, or -1 if there was a write out of bounds.
  int64_t finish() const {
    int64_t total = 0;
    for (const Memory& memory : memory_) {
      unsigned char guard[kGuard];
      check(cudaMemcpy(guard, memory.start() + memory.bytes - kGuard, kGuard, cudaMemcpyDeviceToHost));
      for (unsigned char byte : guard) {
        if (byte != 0xff) return -1;
      }
      total += memory.bytes - kGuard;
    }
    return total;
  }

  keras_das::CudaCall call;

 private:
  std::deque<Memory> memory_;
};

std::string run(bool backward, keras_das::DType dtype, const keras_das::Geometry& geometry, void* const* b,
                const keras_das::CudaCall& call) {
  if (backward) {
    return keras_das::cuda_backward(dtype, geometry,
                                    {b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9]}, call);
  }
  return keras_das::cuda_forward(dtype, geometry, {b[0], b[1], b[2], b[3], b[4], b[5]}, call);
}

}  // namespace

// `blocks`, `bytes` and `at` describe `count` buffers in the order of the structures in deformable_conv2d.h:
// the host block that contains the buffer, the size of the block, and the position of the buffer in it. The
// block of a null buffer is null. `options`: deterministic (0 or 1), bytes of working memory, and the maximum
// number of blocks. Returns the size of the allocated working memory, or -1 with the error in `message`.
extern "C" int64_t keras_das_on_gpu(int backward, int dtype, const keras_das::Geometry* geometry, int count,
                                    void* const* blocks, const int64_t* bytes, const int64_t* at,
                                    const int64_t* options, char* message, int64_t message_size) {
  std::string problem;
  int64_t taken = -1;
  try {
    std::deque<Copy> copies;
    std::vector<void*> buffers(static_cast<size_t>(count), nullptr);
    for (int i = 0; i < count; ++i) {
      if (blocks[i] == nullptr) continue;
      copies.emplace_back(blocks[i], bytes[i]);
      buffers[static_cast<size_t>(i)] = copies.back().start + at[i];
    }
    DeviceCall device(options);
    problem = run(backward, static_cast<keras_das::DType>(dtype), *geometry, buffers.data(), device.call);
    check(cudaDeviceSynchronize());
    taken = device.finish();
    for (const Copy& copy : copies) copy.bring_back();
  } catch (const std::runtime_error& error) {
    problem = error.what();
  }
  if (problem.empty() && taken < 0) problem = "something was written beyond working memory";
  std::strncpy(message, problem.c_str(), static_cast<size_t>(message_size));
  message[message_size - 1] = 0;
  return problem.empty() ? taken : -1;
}
