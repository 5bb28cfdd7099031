// The TensorFlow ops in programs that XLA compiles. Each becomes a custom call to its handler in ffi.cc.
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/util/determinism.h"
#include "tf_arguments.h"
#include "xla/hlo/builder/lib/math.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace keras_das {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;

std::string to_mlir(const Shape& values) {
  std::string text = "array<i64";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : ": ") + std::to_string(values[i]);
  return text + ">";
}

// The attributes as an MLIR dictionary, the form that typed handlers read.
std::string to_mlir(const Attributes& attributes) {
  const auto flag = [](bool value) { return std::string(value ? "true" : "false"); };
  return "{strides = " + to_mlir(attributes.strides) + ", dilations = " + to_mlir(attributes.dilations) +
         ", padding = \"" + attributes.padding + "\"" +
         ", explicit_paddings = " + to_mlir(attributes.explicit_paddings) +
         ", offset_groups = " + std::to_string(attributes.offset_groups) + " : i64" +
         ", has_mask = " + flag(attributes.has_mask) + ", has_bias = " + flag(attributes.has_bias) +
         ", deterministic = " + flag(tensorflow::OpDeterminismRequired()) + "}";
}

// The shape in row-major order, which the kernels require.
xla::Shape to_xla(xla::PrimitiveType type, const Shape& shape) {
  return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, shape);
}

using Shapes = std::vector<Shape>;

// The part that both ops share: attributes, checks and the custom call. A kernel may compile two programs at
// the same time, so it does not store anything of a call.
class DeformableConv2DXlaOpBase : public XlaOpKernel {
 public:
  explicit DeformableConv2DXlaOpBase(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, read_attributes(context, &attributes_, &dtype_));
  }

 protected:
  // Reads the shapes of the inputs, plans the call and checks them. `fifth` and `wanted` name the last input
  // and its shape.
  absl::Status plan(XlaOpKernelContext* context, const char* fifth, Shape Plan::* wanted, Shapes* shapes,
                    Plan* plan) const {
    for (int i = 0; i < context->num_inputs(); ++i) {
      const auto shape = context->InputXlaShape(i);
      TF_RETURN_IF_ERROR(shape.status());
      if (shape->is_dynamic()) {
        return absl::UnimplementedError(
            "The fused deformable convolution does not support XLA tensors of dynamic size; use "
            "implementation=\"reference\". Received: argument " +
            std::to_string(i) + " of shape " + shape->ToString());
      }
      shapes->emplace_back(shape->dimensions().begin(), shape->dimensions().end());
    }
    TF_RETURN_IF_ERROR(to_status(make_plan(attributes_, (*shapes)[0], (*shapes)[1], plan)));
    TF_RETURN_IF_ERROR(to_status(check_shape("offsets", (*shapes)[2], plan->offsets)));
    TF_RETURN_IF_ERROR(to_status(check_shape("mask", (*shapes)[3], plan->mask)));
    return to_status(check_shape(fifth, (*shapes)[4], plan->*wanted));
  }

  xla::XlaOp custom_call(XlaOpKernelContext* context, const char* target, const Shapes& shapes,
                         const std::vector<int>& products, const xla::Shape& result) const {
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes;
    for (int i = 0; i < context->num_inputs(); ++i) {
      operands.push_back(context->Input(i));
      operand_shapes.push_back(to_xla(context->input_xla_type(i), shapes[i]));
    }
    for (int i : products) operands[i] = rounded(operands[i]);
    return xla::CustomCallWithLayout(context->builder(), target, operands, result, operand_shapes,
                                     to_mlir(attributes_), /*has_side_effect=*/false,
                                     /*output_operand_aliasing=*/{},
                                     /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
                                     xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  }

  Attributes attributes_;
  DType dtype_;

 private:
  // The operand with the precision of the dtype. The kernels rely on it for the kernel and the gradient of
  // the output (deformable_conv2d_cuda.h), and XLA may remove conversions to 16 bits and back.
  xla::XlaOp rounded(xla::XlaOp operand) const {
    if (dtype_ == DType::kBFloat16) return xla::ReducePrecision(operand, 8, 7);
    if (dtype_ != DType::kFloat16) return operand;
    // ReducePrecision replaces subnormal numbers, which are multiples of 2^-24, by 0.
    xla::XlaBuilder* builder = operand.builder();
    const auto number = [builder](float value) { return xla::ConstantR0<float>(builder, value); };
    const xla::XlaOp multiple = xla::RoundToEven(xla::Mul(operand, number(0x1p24f)));
    return xla::Select(xla::Lt(xla::Abs(operand), number(0x1p-14f)), xla::Mul(multiple, number(0x1p-24f)),
                       xla::ReducePrecision(operand, 5, 10));
  }
};

class DeformableConv2DXlaOp : public DeformableConv2DXlaOpBase {
 public:
  using DeformableConv2DXlaOpBase::DeformableConv2DXlaOpBase;

  void Compile(XlaOpKernelContext* context) override {
    Shapes shapes;
    Plan plan;
    OP_REQUIRES_OK(context, this->plan(context, "bias", &Plan::bias, &shapes, &plan));
    const xla::Shape result = to_xla(context->input_xla_type(0), plan.output);
    context->SetOutput(0, custom_call(context, "keras_das_deformable_conv2d", shapes, {1}, result));
  }
};

class DeformableConv2DGradXlaOp : public DeformableConv2DXlaOpBase {
 public:
  using DeformableConv2DXlaOpBase::DeformableConv2DXlaOpBase;

  void Compile(XlaOpKernelContext* context) override {
    Shapes shapes;
    Plan plan;
    OP_REQUIRES_OK(context, this->plan(context, "grad_output", &Plan::output, &shapes, &plan));
    const xla::PrimitiveType type = context->input_xla_type(1);
    std::vector<xla::Shape> results;
    for (int i = 0; i < 4; ++i) results.push_back(to_xla(type, shapes[i]));
    results.push_back(to_xla(type, plan.bias));
    const xla::XlaOp call = custom_call(context, "keras_das_deformable_conv2d_grad", shapes, {1, 4},
                                        xla::ShapeUtil::MakeTupleShape(results));
    for (int i = 0; i < 5; ++i) context->SetOutput(i, xla::GetTupleElement(call, i));
  }
};

// REGISTER_XLA_OP has no effect here: TensorFlow creates the kernels of those ops once, when its runtime
// starts, and this library may be loaded later. ffi.cc registers handlers for these devices.
#define KERAS_DAS_REGISTER(device)                                                                  \
  REGISTER_KERNEL_BUILDER(Name("KerasDas>DeformableConv2D").Device(device), DeformableConv2DXlaOp); \
  REGISTER_KERNEL_BUILDER(Name("KerasDas>DeformableConv2DGrad").Device(device), DeformableConv2DGradXlaOp)

KERAS_DAS_REGISTER(tensorflow::DEVICE_CPU_XLA_JIT);
#if defined(KERAS_DAS_CUDA)
KERAS_DAS_REGISTER(tensorflow::DEVICE_GPU_XLA_JIT);
#endif

}  // namespace
}  // namespace keras_das
