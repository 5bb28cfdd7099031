// Reads the attributes of an op, for the TensorFlow ops and their XLA kernels.
#ifndef KERAS_DAS_CSRC_TF_ARGUMENTS_H_
#define KERAS_DAS_CSRC_TF_ARGUMENTS_H_

#include <string>

#include "arguments.h"
#include "tensorflow/core/framework/types.pb.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/status.h"

namespace keras_das {

inline absl::Status to_status(const std::string& error) {
  return error.empty() ? absl::OkStatus() : absl::InvalidArgumentError(error);
}

// `Context` is OpKernelConstruction or InferenceContext.
template <typename Context>
absl::Status read_attributes(Context* context, Attributes* attributes, DType* dtype) {
  TF_RETURN_IF_ERROR(context->GetAttr("strides", &attributes->strides));
  TF_RETURN_IF_ERROR(context->GetAttr("dilations", &attributes->dilations));
  TF_RETURN_IF_ERROR(context->GetAttr("padding", &attributes->padding));
  TF_RETURN_IF_ERROR(context->GetAttr("explicit_paddings", &attributes->explicit_paddings));
  TF_RETURN_IF_ERROR(context->GetAttr("offset_groups", &attributes->offset_groups));
  TF_RETURN_IF_ERROR(context->GetAttr("has_mask", &attributes->has_mask));
  TF_RETURN_IF_ERROR(context->GetAttr("has_bias", &attributes->has_bias));
  tensorflow::DataType inputs_type, sum_type;
  TF_RETURN_IF_ERROR(context->GetAttr("T", &inputs_type));
  TF_RETURN_IF_ERROR(context->GetAttr("A", &sum_type));
  switch (inputs_type) {
    case tensorflow::DT_HALF: *dtype = DType::kFloat16; break;
    case tensorflow::DT_BFLOAT16: *dtype = DType::kBFloat16; break;
    case tensorflow::DT_FLOAT: *dtype = DType::kFloat32; break;
    default: *dtype = DType::kFloat64; break;  // the op allows no other type
  }
  if ((sum_type == tensorflow::DT_DOUBLE) != (*dtype == DType::kFloat64)) {
    return absl::InvalidArgumentError(
        "`A`, the type of all tensors but `inputs` and its output, must be double if `T` is, else float. "
        "Received: T=" +
        tensorflow::DataType_Name(inputs_type) + ", A=" + tensorflow::DataType_Name(sum_type));
  }
  Settings settings;
  return to_status(make_settings(*attributes, &settings));
}

}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_TF_ARGUMENTS_H_
