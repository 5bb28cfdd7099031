// The checks that every binding does before it calls the kernels: from the attributes of an op to settings,
// and to the shape that each tensor must have.
#ifndef KERAS_DAS_CSRC_ARGUMENTS_H_
#define KERAS_DAS_CSRC_ARGUMENTS_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "deformable_conv2d.h"

namespace keras_das {

using Shape = std::vector<int64_t>;

// The attributes of both ops, as TensorFlow, XLA and JAX pass them.
struct Attributes {
  Shape strides, dilations, explicit_paddings;
  std::string padding;  // "SAME" or "EXPLICIT"
  int64_t offset_groups = 1;
  bool has_mask = false, has_bias = false;
};

// The sizes of a call and the shape that each tensor must have. An absent mask or bias has shape (0,).
struct Plan {
  Geometry geometry;
  Shape offsets, mask, bias, output;
};

inline std::string to_text(const Shape& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i ? ", " : "") + (values[i] < 0 ? "?" : std::to_string(values[i]));
  }
  return text + (values.size() == 1 ? ",)" : ")");
}

// Checks the rank of an argument. Returns the error message, or "".
inline std::string check_rank(const std::string& name, const Shape& found, size_t rank) {
  if (found.size() == rank) return "";
  return "`" + name + "` must have rank " + std::to_string(rank) + ". Received: " + name +
         ".shape=" + to_text(found);
}

// Checks the shape of an argument. Returns the error message, or "". Negative sizes are unknown and match any
// size.
inline std::string check_shape(const std::string& name, const Shape& found, const Shape& wanted) {
  bool fits = found.size() == wanted.size();
  for (size_t i = 0; fits && i < found.size(); ++i) {
    fits = found[i] == wanted[i] || found[i] < 0 || wanted[i] < 0;
  }
  if (fits) return "";
  return "`" + name + "` must have shape " + to_text(wanted) + ". Received: " + name +
         ".shape=" + to_text(found);
}

// Converts attributes to settings. Checks only the number of values; `make_geometry` checks the values.
// Returns the error message, or "".
inline std::string make_settings(const Attributes& attributes, Settings* settings) {
  const auto copy = [](const char* name, const Shape& values, size_t count, int64_t* to) -> std::string {
    if (values.size() != count) {
      return "`" + std::string(name) + "` must be " + std::to_string(count) + " integers. Received: " + name +
             "=" + to_text(values);
    }
    std::copy(values.begin(), values.end(), to);
    return "";
  };
  if (attributes.padding != "SAME" && attributes.padding != "EXPLICIT") {
    return "`padding` must be \"SAME\" or \"EXPLICIT\". Received: padding=\"" + attributes.padding + "\"";
  }
  settings->same = attributes.padding == "SAME";
  settings->offset_groups = attributes.offset_groups;
  std::string error = copy("strides", attributes.strides, 2, settings->stride);
  if (error.empty()) error = copy("dilations", attributes.dilations, 2, settings->dilation);
  if (error.empty()) error = copy("explicit_paddings", attributes.explicit_paddings, 4, settings->padding);
  return error;
}

// Plans a call with `inputs` and `kernel` of these shapes. Returns the error message, or "".
inline std::string make_plan(const Attributes& attributes, const Shape& inputs, const Shape& kernel,
                             Plan* plan) {
  Settings settings;
  std::string error = make_settings(attributes, &settings);
  if (error.empty()) error = check_rank("inputs", inputs, 4);
  if (error.empty()) error = check_rank("kernel", kernel, 4);
  Geometry& geometry = plan->geometry;
  if (error.empty()) error = make_geometry(inputs.data(), kernel.data(), settings, &geometry);
  if (!error.empty()) return error;
  const auto field = [&](int64_t depth) {
    return Shape{geometry.batch, geometry.out_height, geometry.out_width, depth};
  };
  const int64_t samples = geometry.offset_groups * geometry.taps();
  plan->offsets = field(samples * 2);
  plan->mask = attributes.has_mask ? field(samples) : Shape{0};
  plan->bias = Shape{attributes.has_bias ? geometry.filters : 0};
  plan->output = field(geometry.filters);
  return "";
}

}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_ARGUMENTS_H_
