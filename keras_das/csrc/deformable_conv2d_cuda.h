// Deformable convolution on NVIDIA GPUs, as the bindings call it. See deformable_conv2d.h for sizes and
// tensors, which are in device memory here. For a 16-bit type, `kernel` and `grad_output` are floats, but
// their values must have the precision of that type, because tensor cores round to it.
#ifndef KERAS_DAS_CSRC_DEFORMABLE_CONV2D_CUDA_H_
#define KERAS_DAS_CSRC_DEFORMABLE_CONV2D_CUDA_H_

#include <cstdint>
#include <functional>
#include <string>

#include "deformable_conv2d.h"

namespace keras_das {

// The resources of a call.
struct CudaCall {
  void* stream = nullptr;  // a cudaStream_t; its device is the thread's current one
  // Returns device memory of this size, aligned to 16 bytes, or null. It must stay allocated until the work
  // that is on `stream` then has finished.
  std::function<void*(int64_t bytes)> allocate;
  // Whether the gradient of `inputs` has the same bits at every run. All other results always have.
  bool deterministic = false;
  // The approximate size of each of at most four buffers of working memory. Calls that need more are done in
  // parts.
  int64_t workspace_bytes = int64_t{64} << 20;
  int64_t most_blocks = int64_t{1} << 20;  // of one launch; kernels loop over the rest
};

// Both put work on the stream and return. The result is the error message, or "".
std::string cuda_forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers,
                         const CudaCall& call);
std::string cuda_backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers,
                          const CudaCall& call);

}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_DEFORMABLE_CONV2D_CUDA_H_
