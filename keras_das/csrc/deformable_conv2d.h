// Deformable convolution on CPUs: plain C++ on pointers and sizes, independent of TensorFlow, XLA and JAX.
// The bindings (tf_ops.cc, xla_ops.cc, ffi.cc) fill these structures and call `forward` and `backward`. All
// tensors are channels last and densely packed.
#ifndef KERAS_DAS_CSRC_DEFORMABLE_CONV2D_H_
#define KERAS_DAS_CSRC_DEFORMABLE_CONV2D_H_

#include <cstdint>
#include <string>

#include "parallel.h"

namespace keras_das {

// The type of `inputs` and `output`. All other tensors have the type of the sums: double for kFloat64,
// otherwise float.
enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// The settings of a convolution, as a binding receives them.
struct Settings {
  int64_t stride[2] = {1, 1};         // rows, columns
  int64_t dilation[2] = {1, 1};       // rows, columns
  bool same = false;                  // pad like TensorFlow's "same", and ignore `padding`
  int64_t padding[4] = {0, 0, 0, 0};  // top, bottom, left, right
  int64_t offset_groups = 1;
};

// All sizes of one call. Kernels trust them, because only `make_geometry` creates this structure.
struct Geometry {
  int64_t batch, height, width, channels;  // of the inputs
  int64_t out_height, out_width, filters;  // of the output
  int64_t kernel_height, kernel_width;     // taps
  int64_t stride[2], dilation[2], pad_top, pad_left;
  int64_t groups, offset_groups;

  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t out_pixels() const { return out_height * out_width; }  // of one image
};

// Checks settings and the shapes of `inputs` (N, H, W, C) and `kernel` (kh, kw, C / groups, filters), and
// fills `geometry`. Returns the error message, which names the argument, or "". No product of sizes that a
// kernel computes overflows 64 bits then.
std::string make_geometry(const int64_t inputs_shape[4], const int64_t kernel_shape[4],
                          const Settings& settings, Geometry* geometry);

// The number of elements of each tensor.
int64_t output_elements(const Geometry& geometry);   // (N, Ho, Wo, filters)
int64_t offsets_elements(const Geometry& geometry);  // (N, Ho, Wo, offset_groups * taps * 2)
int64_t mask_elements(const Geometry& geometry);     // (N, Ho, Wo, offset_groups * taps)

struct ForwardBuffers {
  const void* inputs;
  const void* kernel;
  const void* offsets;
  const void* mask;  // null: all ones
  const void* bias;  // (filters,), or null: none
  void* output;
};

// The gradients, including `grad_output`, have the type of the sums.
struct BackwardBuffers {
  const void* inputs;
  const void* kernel;
  const void* offsets;
  const void* mask;  // null: all ones
  const void* grad_output;
  void* grad_inputs;
  void* grad_kernel;
  void* grad_offsets;
  void* grad_mask;  // null if and only if `mask` is
  void* grad_bias;  // null: not computed
};

// The results of both have the same bits for any number of threads, and for an image in any batch. They
// return the error message, or "". The only error is a lack of memory for working copies.
std::string forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers,
                    const Workers& workers);
std::string backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers,
                     const Workers& workers);

// The instruction set that the kernels use on this machine: "avx512", "avx2" or "baseline". The environment
// variable KERAS_DAS_ISA, which is read once, selects a lower one.
const char* instruction_set();

}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_DEFORMABLE_CONV2D_H_
