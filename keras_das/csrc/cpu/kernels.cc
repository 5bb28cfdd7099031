// Deformable convolution and its gradients on CPUs. Compiled once for each instruction set; see
// deformable_conv2d.cc for the choice among them.
//
// The linker keeps one copy of an inline function that several object files define, possibly one with
// instructions that the processor lacks. Therefore all code here has internal linkage or is in a namespace
// named after the instruction set, and it does not use inline functions of the standard library that other
// files use too.
#include <cstring>

#include "common.h"
#include "cpu/backward.h"
#include "cpu/dense.h"
#include "cpu/depthwise.h"
#include "deformable_conv2d.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

template <class T>
void forward_of(const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers) {
  using A = typename SumType<T>::type;
  if (output_elements(geometry) == 0) return;
  if (is_depthwise(geometry)) depthwise_forward<T, A>(geometry, buffers, workers);
  else dense_forward<T, A>(geometry, buffers, workers);
}

template <class T>
void backward_of(const Geometry& geometry, const BackwardBuffers& buffers, const Workers& workers) {
  using A = typename SumType<T>::type;
  if (output_elements(geometry) == 0) {
    const int64_t weights = geometry.taps() * (geometry.channels / geometry.groups) * geometry.filters;
    std::memset(buffers.grad_kernel, 0, static_cast<size_t>(weights) * sizeof(A));
    if (buffers.grad_bias) {
      std::memset(buffers.grad_bias, 0, static_cast<size_t>(geometry.filters) * sizeof(A));
    }
    return;  // there are neither pixels nor offsets
  }
  Backward<T, A> pass(geometry, buffers, workers);
  if (is_depthwise(geometry)) depthwise_backward(&pass);
  else dense_backward(&pass);
  pass.grad_offsets.add_up(workers);
  pass.grad_mask.add_up(workers);
  if (buffers.grad_bias) bias_gradient<A>(geometry, buffers, workers);
}

}  // namespace

void forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers) {
  switch (dtype) {
    case DType::kFloat16: return forward_of<Half>(geometry, buffers, workers);
    case DType::kBFloat16: return forward_of<BFloat16>(geometry, buffers, workers);
    case DType::kFloat32: return forward_of<float>(geometry, buffers, workers);
    case DType::kFloat64: return forward_of<double>(geometry, buffers, workers);
  }
}

void backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers, const Workers& workers) {
  switch (dtype) {
    case DType::kFloat16: return backward_of<Half>(geometry, buffers, workers);
    case DType::kBFloat16: return backward_of<BFloat16>(geometry, buffers, workers);
    case DType::kFloat32: return backward_of<float>(geometry, buffers, workers);
    case DType::kFloat64: return backward_of<double>(geometry, buffers, workers);
  }
}

}  // namespace KERAS_DAS_ISA
}  // namespace keras_das
