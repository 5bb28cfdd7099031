// The TensorFlow ops: declarations, shape functions, and kernels for CPUs and, in a library with CUDA
// kernels, for NVIDIA GPUs.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "deformable_conv2d.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tf_arguments.h"
#if defined(KERAS_DAS_CUDA)
#include "deformable_conv2d_cuda.h"
#include "tensorflow/core/util/determinism.h"
#include "xla/stream_executor/stream.h"
#endif

namespace keras_das {
namespace {

using tensorflow::DEVICE_CPU;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;

constexpr int64_t kUnknown = -1;

// The shape of an input of an op in a graph.
struct Found {
  Shape shape;  // unknown sizes are negative
  bool rank_known;
};

Found find_input(InferenceContext* context, int index) {
  const auto handle = context->input(index);
  Found found{{}, context->RankKnown(handle)};
  for (int axis = 0; found.rank_known && axis < context->Rank(handle); ++axis) {
    found.shape.push_back(context->Value(context->Dim(handle, axis)));
  }
  return found;
}

// The smallest size of the inputs along an axis for which there is an output, or 1 if it does not fit into 64
// bits.
int64_t least_size(int64_t taps, int64_t dilation) {
  int64_t size;
  return __builtin_mul_overflow(taps - 1, dilation, &size) || __builtin_add_overflow(size, 1, &size) ? 1
                                                                                                     : size;
}

bool all_known(const Shape& shape) {
  return std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size >= 0; });
}

// Infers the shapes in `plan`, as far as the known sizes determine them. Does not fill `plan->geometry`.
std::string infer_plan(const Attributes& attributes, const Found& inputs, const Found& kernel, Plan* plan) {
  std::string error = inputs.rank_known ? check_rank("inputs", inputs.shape, 4) : "";
  if (error.empty() && kernel.rank_known) error = check_rank("kernel", kernel.shape, 4);
  if (!error.empty()) return error;
  const bool solvable =
      inputs.rank_known && kernel.rank_known && all_known(kernel.shape) && inputs.shape[3] >= 0;
  if (!solvable) {
    const int64_t batch = inputs.rank_known ? inputs.shape[0] : kUnknown;
    const int64_t filters = kernel.rank_known ? kernel.shape[3] : kUnknown;
    const Shape field{batch, kUnknown, kUnknown, kUnknown};
    plan->offsets = field;
    plan->mask = attributes.has_mask ? field : Shape{0};
    plan->bias = Shape{attributes.has_bias ? filters : 0};
    plan->output = Shape{batch, kUnknown, kUnknown, filters};
    return "";
  }
  // Replaces unknown sizes by sizes that fit, and makes them unknown again in the result.
  Shape trial = inputs.shape;
  if (trial[0] < 0) trial[0] = 1;
  for (int axis : {0, 1}) {
    if (trial[axis + 1] < 0) trial[axis + 1] = least_size(kernel.shape[axis], attributes.dilations[axis]);
  }
  error = make_plan(attributes, trial, kernel.shape, plan);
  if (!error.empty()) return error;
  for (Shape* shape : {&plan->offsets, &plan->mask, &plan->output}) {
    for (int axis = 0; axis < 3 && shape->size() == 4; ++axis) {
      if (inputs.shape[axis] < 0) (*shape)[axis] = kUnknown;
    }
  }
  return "";
}

// Plans the call and checks the inputs. `fifth` and `wanted` name the last input and its shape.
absl::Status infer_and_check(InferenceContext* context, const char* fifth, Shape Plan::* wanted, Plan* plan) {
  Attributes attributes;
  DType dtype;
  TF_RETURN_IF_ERROR(read_attributes(context, &attributes, &dtype));
  TF_RETURN_IF_ERROR(to_status(infer_plan(attributes, find_input(context, 0), find_input(context, 1), plan)));
  const auto check = [&](int index, const char* name, const Shape& shape) {
    const Found found = find_input(context, index);
    return to_status(found.rank_known ? check_shape(name, found.shape, shape) : "");
  };
  TF_RETURN_IF_ERROR(check(2, "offsets", plan->offsets));
  TF_RETURN_IF_ERROR(check(3, "mask", plan->mask));
  return check(4, fifth, plan->*wanted);
}

tensorflow::shape_inference::ShapeHandle to_handle(InferenceContext* context, const Shape& shape) {
  std::vector<DimensionHandle> sizes;
  for (int64_t size : shape) sizes.push_back(size < 0 ? context->UnknownDim() : context->MakeDim(size));
  return context->MakeShape(sizes);
}

absl::Status infer_forward(InferenceContext* context) {
  Plan plan;
  TF_RETURN_IF_ERROR(infer_and_check(context, "bias", &Plan::bias, &plan));
  context->set_output(0, to_handle(context, plan.output));
  return absl::OkStatus();
}

absl::Status infer_backward(InferenceContext* context) {
  Plan plan;
  TF_RETURN_IF_ERROR(infer_and_check(context, "grad_output", &Plan::output, &plan));
  for (int i = 0; i < 4; ++i) context->set_output(i, context->input(i));
  context->set_output(4, to_handle(context, plan.bias));
  return absl::OkStatus();
}

Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.shape().dim_sizes();
  return Shape(sizes.begin(), sizes.end());
}

Workers make_workers(OpKernelContext* context) {
  const auto* threads = context->device()->tensorflow_cpu_worker_threads();
  Workers workers;
  workers.threads = threads->num_threads;
  workers.schedule = [pool = threads->workers](std::function<void()> work) {
    pool->Schedule(std::move(work));
  };
  return workers;
}

// Runs the kernels on the threads of TensorFlow.
struct OnCpu {
  static absl::Status run(OpKernelContext* context, DType dtype, const Geometry& geometry,
                          const ForwardBuffers& b) {
    return to_status(forward(dtype, geometry, b, make_workers(context)));
  }
  static absl::Status run(OpKernelContext* context, DType dtype, const Geometry& geometry,
                          const BackwardBuffers& b) {
    return to_status(backward(dtype, geometry, b, make_workers(context)));
  }
  static absl::Status to_status(const std::string& problem) {
    return problem.empty() ? absl::OkStatus() : absl::ResourceExhaustedError(problem);
  }
};

#if defined(KERAS_DAS_CUDA)
// Puts the kernels on the stream of TensorFlow. TensorFlow reuses their working memory only for later work on
// that stream.
class OnGpu {
 public:
  static absl::Status run(OpKernelContext* context, DType dtype, const Geometry& geometry,
                          const ForwardBuffers& b) {
    OnGpu gpu(context);
    return gpu.to_status(cuda_forward(dtype, geometry, b, gpu.call_));
  }
  static absl::Status run(OpKernelContext* context, DType dtype, const Geometry& geometry,
                          const BackwardBuffers& b) {
    OnGpu gpu(context);
    return gpu.to_status(cuda_backward(dtype, geometry, b, gpu.call_));
  }

 private:
  explicit OnGpu(OpKernelContext* context) {
    call_.stream = context->op_device_context()->stream()->platform_specific_handle().stream;
    call_.deterministic = tensorflow::OpDeterminismRequired();
    call_.allocate = [this, context](int64_t bytes) -> void* {
      memory_.emplace_back();
      allocated_ = context->allocate_temp(tensorflow::DT_INT8, TensorShape({bytes}), &memory_.back());
      return allocated_.ok() ? memory_.back().data() : nullptr;
    };
  }

  absl::Status to_status(const std::string& problem) const {
    if (!allocated_.ok()) return allocated_;
    return problem.empty() ? absl::OkStatus()
                           : absl::InternalError("The fused deformable convolution: " + problem);
  }

  CudaCall call_;
  std::deque<Tensor> memory_;
  absl::Status allocated_;
};
#endif

// The part that both ops share: attributes and checks.
class DeformableConv2DOpBase : public OpKernel {
 public:
  explicit DeformableConv2DOpBase(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, read_attributes(context, &attributes_, &dtype_));
  }

 protected:
  // Plans the call and checks the inputs. `fifth` and `wanted` name the last input and its shape.
  absl::Status plan(OpKernelContext* context, const char* fifth, Shape Plan::* wanted, Plan* plan) const {
    const auto check = [&](int index, const char* name, const Shape& shape) {
      return to_status(check_shape(name, shape_of(context->input(index)), shape));
    };
    TF_RETURN_IF_ERROR(
        to_status(make_plan(attributes_, shape_of(context->input(0)), shape_of(context->input(1)), plan)));
    TF_RETURN_IF_ERROR(check(2, "offsets", plan->offsets));
    TF_RETURN_IF_ERROR(check(3, "mask", plan->mask));
    return check(4, fifth, plan->*wanted);
  }

  Attributes attributes_;
  DType dtype_;
};

template <class Device>
class DeformableConv2DOp : public DeformableConv2DOpBase {
 public:
  using DeformableConv2DOpBase::DeformableConv2DOpBase;

  void Compute(OpKernelContext* context) override {
    Plan plan;
    OP_REQUIRES_OK(context, this->plan(context, "bias", &Plan::bias, &plan));
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape(plan.output), &output));
    ForwardBuffers buffers{};
    buffers.inputs = context->input(0).data();
    buffers.kernel = context->input(1).data();
    buffers.offsets = context->input(2).data();
    buffers.mask = attributes_.has_mask ? context->input(3).data() : nullptr;
    buffers.bias = attributes_.has_bias ? context->input(4).data() : nullptr;
    buffers.output = output->data();
    OP_REQUIRES_OK(context, Device::run(context, dtype_, plan.geometry, buffers));
  }
};

template <class Device>
class DeformableConv2DGradOp : public DeformableConv2DOpBase {
 public:
  using DeformableConv2DOpBase::DeformableConv2DOpBase;

  void Compute(OpKernelContext* context) override {
    Plan plan;
    OP_REQUIRES_OK(context, this->plan(context, "grad_output", &Plan::output, &plan));
    Tensor* gradients[5];
    for (int i = 0; i < 5; ++i) {
      const TensorShape shape = i < 4 ? context->input(i).shape() : TensorShape(plan.bias);
      OP_REQUIRES_OK(context, context->allocate_output(i, shape, &gradients[i]));
    }
    BackwardBuffers buffers{};
    buffers.inputs = context->input(0).data();
    buffers.kernel = context->input(1).data();
    buffers.offsets = context->input(2).data();
    buffers.mask = attributes_.has_mask ? context->input(3).data() : nullptr;
    buffers.grad_output = context->input(4).data();
    buffers.grad_inputs = gradients[0]->data();
    buffers.grad_kernel = gradients[1]->data();
    buffers.grad_offsets = gradients[2]->data();
    buffers.grad_mask = attributes_.has_mask ? gradients[3]->data() : nullptr;
    buffers.grad_bias = attributes_.has_bias ? gradients[4]->data() : nullptr;
    OP_REQUIRES_OK(context, Device::run(context, dtype_, plan.geometry, buffers));
  }
};

}  // namespace

// `A` is the type of the sums: double if `T` is, otherwise float. An absent mask or bias is a tensor of shape
// (0,), and so is its gradient.
REGISTER_OP("KerasDas>DeformableConv2D")
    .Input("inputs: T")
    .Input("kernel: A")
    .Input("offsets: A")
    .Input("mask: A")
    .Input("bias: A")
    .Output("output: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("A: {float, double}")
    .Attr("strides: list(int)")
    .Attr("dilations: list(int)")
    .Attr("padding: {'SAME', 'EXPLICIT'}")
    .Attr("explicit_paddings: list(int)")
    .Attr("offset_groups: int")
    .Attr("has_mask: bool")
    .Attr("has_bias: bool")
    .SetShapeFn(infer_forward);

REGISTER_OP("KerasDas>DeformableConv2DGrad")
    .Input("inputs: T")
    .Input("kernel: A")
    .Input("offsets: A")
    .Input("mask: A")
    .Input("grad_output: A")
    .Output("grad_inputs: A")
    .Output("grad_kernel: A")
    .Output("grad_offsets: A")
    .Output("grad_mask: A")
    .Output("grad_bias: A")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("A: {float, double}")
    .Attr("strides: list(int)")
    .Attr("dilations: list(int)")
    .Attr("padding: {'SAME', 'EXPLICIT'}")
    .Attr("explicit_paddings: list(int)")
    .Attr("offset_groups: int")
    .Attr("has_mask: bool")
    .Attr("has_bias: bool")
    .SetShapeFn(infer_backward);

REGISTER_KERNEL_BUILDER(Name("KerasDas>DeformableConv2D").Device(DEVICE_CPU), DeformableConv2DOp<OnCpu>);
REGISTER_KERNEL_BUILDER(Name("KerasDas>DeformableConv2DGrad").Device(DEVICE_CPU),
                        DeformableConv2DGradOp<OnCpu>);
#if defined(KERAS_DAS_CUDA)
REGISTER_KERNEL_BUILDER(Name("KerasDas>DeformableConv2D").Device(tensorflow::DEVICE_GPU),
                        DeformableConv2DOp<OnGpu>);
REGISTER_KERNEL_BUILDER(Name("KerasDas>DeformableConv2DGrad").Device(tensorflow::DEVICE_GPU),
                        DeformableConv2DGradOp<OnGpu>);
#endif

}  // namespace keras_das
