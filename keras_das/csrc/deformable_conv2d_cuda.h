// Deformable convolution on NVIDIA GPUs: what the doors call. See deformable_conv2d.h for sizes and tensors, which here
// lie in the device's memory. With a 16-bit type, values of `kernel` and `grad_output` must be of that type's precision,
// though they lie there as floats: tensor cores would round others.
#ifndef KERAS_DAS_CSRC_DEFORMABLE_CONV2D_CUDA_H_
#define KERAS_DAS_CSRC_DEFORMABLE_CONV2D_CUDA_H_

#include <cstdint>
#include <functional>
#include <string>

#include "deformable_conv2d.h"

namespace keras_das {

// How kernels are launched.
struct CudaCall {
  void* stream = nullptr;  // a cudaStream_t; its device is the thread's current one
  // Gives that many bytes of device memory, aligned to 16, which stay ours until the work on `stream` so far is done;
  // or null.
  std::function<void*(int64_t bytes)> allocate;
  // The same bits at every run, also of the gradient for `inputs`. All else always has them.
  bool deterministic = false;
  // About how many bytes of working memory each of at most four buffers may take. Beyond it the work is done in parts.
  int64_t workspace_bytes = int64_t{64} << 20;
  int64_t most_blocks = int64_t{1} << 20;  // of one launch; kernels loop over what is left
};

// Both only put work on the stream. They return "", or what went wrong: no memory, or a launch that failed.
std::string cuda_forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers, const CudaCall& call);
std::string cuda_backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers, const CudaCall& call);

}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_DEFORMABLE_CONV2D_CUDA_H_
