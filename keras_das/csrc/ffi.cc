// Typed XLA FFI handlers, for programs that XLA compiles: TensorFlow's `jit_compile=True`, and JAX. Compiles
// with the headers of either.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "arguments.h"
#include "deformable_conv2d.h"
#include "xla/ffi/api/ffi.h"
#if defined(KERAS_DAS_CUDA)
#include "deformable_conv2d_cuda.h"
#endif

namespace keras_das {
namespace {

namespace ffi = xla::ffi;

using Integers = ffi::Span<const int64_t>;
using Result = ffi::Result<ffi::AnyBuffer>;

Shape shape_of(const ffi::AnyBuffer& buffer) {
  return Shape(buffer.dimensions().begin(), buffer.dimensions().end());
}

Attributes make_attributes(Integers strides, Integers dilations, std::string_view padding,
                           Integers explicit_paddings, int64_t offset_groups, bool has_mask, bool has_bias) {
  const auto copy = [](Integers values) { return Shape(values.begin(), values.end()); };
  return {copy(strides), copy(dilations), copy(explicit_paddings), std::string(padding), offset_groups,
          has_mask,      has_bias};
}

// Checks tensors and keeps the error message of the first one that does not fit.
class Checker {
 public:
  Checker(const Attributes& attributes, const ffi::AnyBuffer& inputs, const ffi::AnyBuffer& kernel) {
    switch (inputs.element_type()) {
      case ffi::F16: dtype_ = DType::kFloat16; break;
      case ffi::BF16: dtype_ = DType::kBFloat16; break;
      case ffi::F32: dtype_ = DType::kFloat32; break;
      case ffi::F64: dtype_ = DType::kFloat64; break;
      default:
        error_ = "`inputs` must be float16, bfloat16, float32 or float64. Received: XLA type " +
                 std::to_string(static_cast<int>(inputs.element_type()));
    }
    inputs_type_ = inputs.element_type();
    sum_type_ = dtype_ == DType::kFloat64 ? ffi::F64 : ffi::F32;
    if (error_.empty()) error_ = make_plan(attributes, shape_of(inputs), shape_of(kernel), &plan_);
    check_type("kernel", kernel, sum_type_);
  }

  // Checks a tensor of the type of the sums.
  void check(const char* name, const ffi::AnyBuffer& buffer, const Shape& wanted) {
    check_type(name, buffer, sum_type_);
    if (error_.empty()) error_ = check_shape(name, shape_of(buffer), wanted);
  }

  void check_output(const ffi::AnyBuffer& buffer) {
    check_type("output", buffer, inputs_type_);
    if (error_.empty()) error_ = check_shape("output", shape_of(buffer), plan_.output);
  }

  const std::string& error() const { return error_; }
  const Plan& plan() const { return plan_; }
  DType dtype() const { return dtype_; }

 private:
  void check_type(const std::string& name, const ffi::AnyBuffer& buffer, ffi::DataType wanted) {
    if (!error_.empty() || buffer.element_type() == wanted) return;
    error_ = "`" + name + "` must have XLA type " + std::to_string(static_cast<int>(wanted)) +
             " where `inputs` has " + std::to_string(static_cast<int>(inputs_type_)) +
             ". Received: " + std::to_string(static_cast<int>(buffer.element_type()));
  }

  DType dtype_ = DType::kFloat32;
  ffi::DataType inputs_type_, sum_type_;
  Plan plan_;
  std::string error_;
};

// Runs the kernels on the threads of XLA. Must not outlive the pool.
class OnHost {
 public:
  explicit OnHost(ffi::ThreadPool& pool) {
    workers_.threads = std::max<int64_t>(pool.num_threads(), 1);  // 0: the program runs without a pool
    workers_.schedule = [&pool](std::function<void()> work) { pool.Schedule(std::move(work)); };
  }
  ffi::Error run(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers) const {
    return to_error(forward(dtype, geometry, buffers, workers_));
  }
  ffi::Error run(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers) const {
    return to_error(backward(dtype, geometry, buffers, workers_));
  }

 private:
  static ffi::Error to_error(const std::string& problem) {
    if (problem.empty()) return ffi::Error::Success();
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, problem);
  }

  Workers workers_;
};

// Plans and checks a call, and runs it on `device`.
template <class Device>
ffi::Error run_forward(const Device& device, const Attributes& attributes, ffi::AnyBuffer inputs,
                       ffi::AnyBuffer kernel, ffi::AnyBuffer offsets, ffi::AnyBuffer mask,
                       ffi::AnyBuffer bias, Result output) {
  Checker checker(attributes, inputs, kernel);
  const Plan& plan = checker.plan();
  checker.check("offsets", offsets, plan.offsets);
  checker.check("mask", mask, plan.mask);
  checker.check("bias", bias, plan.bias);
  checker.check_output(*output);
  if (!checker.error().empty()) return ffi::Error::InvalidArgument(checker.error());
  ForwardBuffers buffers{};
  buffers.inputs = inputs.untyped_data();
  buffers.kernel = kernel.untyped_data();
  buffers.offsets = offsets.untyped_data();
  buffers.mask = attributes.has_mask ? mask.untyped_data() : nullptr;
  buffers.bias = attributes.has_bias ? bias.untyped_data() : nullptr;
  buffers.output = output->untyped_data();
  return device.run(checker.dtype(), plan.geometry, buffers);
}

template <class Device>
ffi::Error run_backward(const Device& device, const Attributes& attributes, ffi::AnyBuffer inputs,
                        ffi::AnyBuffer kernel, ffi::AnyBuffer offsets, ffi::AnyBuffer mask,
                        ffi::AnyBuffer grad_output, Result grad_inputs, Result grad_kernel,
                        Result grad_offsets, Result grad_mask, Result grad_bias) {
  Checker checker(attributes, inputs, kernel);
  const Plan& plan = checker.plan();
  checker.check("offsets", offsets, plan.offsets);
  checker.check("mask", mask, plan.mask);
  checker.check("grad_output", grad_output, plan.output);
  checker.check("grad_inputs", *grad_inputs, shape_of(inputs));
  checker.check("grad_kernel", *grad_kernel, shape_of(kernel));
  checker.check("grad_offsets", *grad_offsets, plan.offsets);
  checker.check("grad_mask", *grad_mask, plan.mask);
  checker.check("grad_bias", *grad_bias, plan.bias);
  if (!checker.error().empty()) return ffi::Error::InvalidArgument(checker.error());
  BackwardBuffers buffers{};
  buffers.inputs = inputs.untyped_data();
  buffers.kernel = kernel.untyped_data();
  buffers.offsets = offsets.untyped_data();
  buffers.mask = attributes.has_mask ? mask.untyped_data() : nullptr;
  buffers.grad_output = grad_output.untyped_data();
  buffers.grad_inputs = grad_inputs->untyped_data();
  buffers.grad_kernel = grad_kernel->untyped_data();
  buffers.grad_offsets = grad_offsets->untyped_data();
  buffers.grad_mask = attributes.has_mask ? grad_mask->untyped_data() : nullptr;
  buffers.grad_bias = attributes.has_bias ? grad_bias->untyped_data() : nullptr;
  return device.run(checker.dtype(), plan.geometry, buffers);
}

// The signature of a handler depends on its context, so each platform has two handlers. All end in the same
// attributes. CPU kernels ignore the last one, because their results are always the same.
#define KERAS_DAS_ATTRIBUTES                                                                  \
  Integers strides, Integers dilations, std::string_view padding, Integers explicit_paddings, \
      int64_t offset_groups, bool has_mask, bool has_bias, bool deterministic
#define KERAS_DAS_MAKE_ATTRIBUTES \
  make_attributes(strides, dilations, padding, explicit_paddings, offset_groups, has_mask, has_bias)

ffi::Error forward_handler(ffi::ThreadPool pool, ffi::AnyBuffer inputs, ffi::AnyBuffer kernel,
                           ffi::AnyBuffer offsets, ffi::AnyBuffer mask, ffi::AnyBuffer bias, Result output,
                           KERAS_DAS_ATTRIBUTES) {
  return run_forward(OnHost(pool), KERAS_DAS_MAKE_ATTRIBUTES, inputs, kernel, offsets, mask, bias, output);
}

ffi::Error backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer inputs, ffi::AnyBuffer kernel,
                            ffi::AnyBuffer offsets, ffi::AnyBuffer mask, ffi::AnyBuffer grad_output,
                            Result grad_inputs, Result grad_kernel, Result grad_offsets, Result grad_mask,
                            Result grad_bias, KERAS_DAS_ATTRIBUTES) {
  return run_backward(OnHost(pool), KERAS_DAS_MAKE_ATTRIBUTES, inputs, kernel, offsets, mask, grad_output,
                      grad_inputs, grad_kernel, grad_offsets, grad_mask, grad_bias);
}

#if defined(KERAS_DAS_CUDA)
// Puts the kernels on the stream of XLA, with working memory of XLA. Must not outlive the allocator.
class OnCuda {
 public:
  OnCuda(void* stream, ffi::ScratchAllocator& memory, bool deterministic) {
    call_.stream = stream;
    call_.deterministic = deterministic;
    // XLA accepts no alignment above 16.
    call_.allocate = [&memory](int64_t bytes) { return memory.Allocate(bytes, 16).value_or(nullptr); };
  }
  ffi::Error run(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers) const {
    return to_error(cuda_forward(dtype, geometry, buffers, call_));
  }
  ffi::Error run(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers) const {
    return to_error(cuda_backward(dtype, geometry, buffers, call_));
  }

 private:
  static ffi::Error to_error(const std::string& problem) {
    if (problem.empty()) return ffi::Error::Success();
    return ffi::Error(ffi::ErrorCode::kInternal, "The fused deformable convolution: " + problem);
  }

  CudaCall call_;
};

ffi::Error cuda_forward_handler(void* stream, ffi::ScratchAllocator memory, ffi::AnyBuffer inputs,
                                ffi::AnyBuffer kernel, ffi::AnyBuffer offsets, ffi::AnyBuffer mask,
                                ffi::AnyBuffer bias, Result output, KERAS_DAS_ATTRIBUTES) {
  return run_forward(OnCuda(stream, memory, deterministic), KERAS_DAS_MAKE_ATTRIBUTES, inputs, kernel,
                     offsets, mask, bias, output);
}

ffi::Error cuda_backward_handler(void* stream, ffi::ScratchAllocator memory, ffi::AnyBuffer inputs,
                                 ffi::AnyBuffer kernel, ffi::AnyBuffer offsets, ffi::AnyBuffer mask,
                                 ffi::AnyBuffer grad_output, Result grad_inputs, Result grad_kernel,
                                 Result grad_offsets, Result grad_mask, Result grad_bias,
                                 KERAS_DAS_ATTRIBUTES) {
  return run_backward(OnCuda(stream, memory, deterministic), KERAS_DAS_MAKE_ATTRIBUTES, inputs, kernel,
                      offsets, mask, grad_output, grad_inputs, grad_kernel, grad_offsets, grad_mask,
                      grad_bias);
}
#endif

// All handlers have five tensors and the same attributes.
template <typename Binding>
auto bind_arguments(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>();
}

template <typename Binding>
auto bind_attributes(Binding&& binding) {
  return std::move(binding)
      .template Attr<Integers>("strides")
      .template Attr<Integers>("dilations")
      .template Attr<std::string_view>("padding")
      .template Attr<Integers>("explicit_paddings")
      .template Attr<int64_t>("offset_groups")
      .template Attr<bool>("has_mask")
      .template Attr<bool>("has_bias")
      .template Attr<bool>("deterministic");
}

template <typename Binding>
auto bind_forward(Binding&& binding) {
  return bind_attributes(bind_arguments(std::move(binding)).template Ret<ffi::AnyBuffer>());
}

template <typename Binding>
auto bind_backward(Binding&& binding) {
  return bind_attributes(bind_arguments(std::move(binding))
                             .template Ret<ffi::AnyBuffer>()
                             .template Ret<ffi::AnyBuffer>()
                             .template Ret<ffi::AnyBuffer>()
                             .template Ret<ffi::AnyBuffer>()
                             .template Ret<ffi::AnyBuffer>());
}

auto bind_host() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

#if defined(KERAS_DAS_CUDA)
auto bind_cuda() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::ScratchAllocator>(); }
#endif

}  // namespace
}  // namespace keras_das

XLA_FFI_DEFINE_HANDLER_SYMBOL(KerasDasDeformableConv2D, keras_das::forward_handler,
                              keras_das::bind_forward(keras_das::bind_host()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KerasDasDeformableConv2DGrad, keras_das::backward_handler,
                              keras_das::bind_backward(keras_das::bind_host()));
#if defined(KERAS_DAS_CUDA)
XLA_FFI_DEFINE_HANDLER_SYMBOL(KerasDasDeformableConv2DCuda, keras_das::cuda_forward_handler,
                              keras_das::bind_forward(keras_das::bind_cuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KerasDasDeformableConv2DGradCuda, keras_das::cuda_backward_handler,
                              keras_das::bind_backward(keras_das::bind_cuda()));
#endif

#ifdef KERAS_DAS_TENSORFLOW
// TensorFlow exports this function, but not `XLA_FFI_GetApi` of the header.
namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();
}

#define KERAS_DAS_REGISTER(platform, forward, backward)                                                 \
  XLA_FFI_REGISTER_HANDLER(xla::ffi::GetXlaFfiApi(), "keras_das_deformable_conv2d", platform, forward); \
  XLA_FFI_REGISTER_HANDLER(xla::ffi::GetXlaFfiApi(), "keras_das_deformable_conv2d_grad", platform, backward)

KERAS_DAS_REGISTER("Host", KerasDasDeformableConv2D, KerasDasDeformableConv2DGrad);
#if defined(KERAS_DAS_CUDA)
KERAS_DAS_REGISTER("CUDA", KerasDasDeformableConv2DCuda, KerasDasDeformableConv2DGradCuda);
#endif
#endif
