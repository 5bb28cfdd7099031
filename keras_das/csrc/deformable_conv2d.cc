#include "deformable_conv2d.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

namespace keras_das {

// The functions of each build of cpu/kernels.cc.
#define KERAS_DAS_DECLARE(isa)                                                   \
  namespace isa {                                                                \
  void forward(DType, const Geometry&, const ForwardBuffers&, const Workers&);   \
  void backward(DType, const Geometry&, const BackwardBuffers&, const Workers&); \
  }
KERAS_DAS_DECLARE(baseline)
#if defined(KERAS_DAS_X86)
KERAS_DAS_DECLARE(avx2)
KERAS_DAS_DECLARE(avx512)
#endif
#undef KERAS_DAS_DECLARE

namespace {

constexpr int64_t kLimit = int64_t{1} << 30;  // sums of products of two such numbers are far below 2^63

std::string shown(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// The output size along one axis. `before` receives the number of zero pixels ahead of the first input pixel.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, bool same,
                    const int64_t* padding, int64_t* before) {
  const int64_t extent = (kernel - 1) * dilation + 1;
  if (!same) {
    *before = padding[0];
    const int64_t last = size + padding[0] + padding[1] - extent;
    return last < 0 ? 0 : last / stride + 1;
  }
  const int64_t out = (size + stride - 1) / stride, total = (out - 1) * stride + extent - size;
  *before = total > 0 ? total / 2 : 0;
  return out;
}

// Whether the product of these sizes is below 2^58, so that the number of bytes fits into 64 bits, too.
bool addressable(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) {
    if (size == 0) return true;
    if (product > (int64_t{1} << 58) / size) return false;
    product *= size;
  }
  return true;
}

std::string check_settings(const Settings& settings) {
  const auto in = [](int64_t value, int64_t least) { return value >= least && value <= kLimit; };
  if (!in(settings.stride[0], 1) || !in(settings.stride[1], 1)) {
    return "`strides` must be positive and at most 2^30. Received: strides=" + shown(settings.stride, 2);
  }
  if (!in(settings.dilation[0], 1) || !in(settings.dilation[1], 1)) {
    return "`dilation_rate` must be positive and at most 2^30. Received: dilation_rate=" +
           shown(settings.dilation, 2);
  }
  for (int64_t side : settings.padding) {
    if (!settings.same && !in(side, 0)) {
      return "`padding` must not be negative and be at most 2^30. Received: padding=" +
             shown(settings.padding, 4);
    }
  }
  if (!in(settings.offset_groups, 1)) {
    return "`offset_groups` must be positive. Received: offset_groups=" +
           std::to_string(settings.offset_groups);
  }
  return "";
}

std::string check_shapes(const int64_t inputs[4], const int64_t kernel[4], const Settings& settings) {
  for (int axis = 0; axis < 4; ++axis) {
    if (inputs[axis] < 0 || (axis && inputs[axis] > kLimit)) {
      return "`inputs` must have sizes of at most 2^30. Received: inputs.shape=" + shown(inputs, 4);
    }
    if (kernel[axis] < 1 || kernel[axis] > kLimit) {
      return "`kernel` must have a shape without zeros, of sizes up to 2^30. Received: kernel.shape=" +
             shown(kernel, 4);
    }
  }
  const int64_t channels = inputs[3], depth = kernel[2];
  if (channels < 1) {
    return "`inputs` must have at least one channel. Received: inputs.shape=" + shown(inputs, 4);
  }
  if (channels % depth || kernel[3] % (channels / depth)) {
    return "`kernel` must have shape (kh, kw, C / groups, filters) with groups dividing both the channels C "
           "of `inputs` (" +
           std::to_string(channels) + ") and the filters. Received: kernel.shape=" + shown(kernel, 4);
  }
  if (channels % settings.offset_groups) {
    return "`offset_groups` must divide the channels of `inputs` (" + std::to_string(channels) +
           "). Received: offset_groups=" + std::to_string(settings.offset_groups);
  }
  return "";
}

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa choose_isa() {
  Isa best = Isa::kBaseline;
#if defined(KERAS_DAS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
#endif
  const char* wanted = std::getenv("KERAS_DAS_ISA");
  if (!wanted) return best;
  if (!std::strcmp(wanted, "baseline")) return Isa::kBaseline;
  if (!std::strcmp(wanted, "avx2") && best > Isa::kAvx2) return Isa::kAvx2;
  return best;
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

#if defined(KERAS_DAS_X86)
#define KERAS_DAS_CHOOSE(function) \
  (isa() == Isa::kAvx512 ? avx512::function : isa() == Isa::kAvx2 ? avx2::function : baseline::function)
#else
#define KERAS_DAS_CHOOSE(function) baseline::function
#endif

template <class F>
std::string run(const F& function) {
  try {
    function();
    return "";
  } catch (const std::bad_alloc&) {
    return "out of memory: there is none for the kernels' working copies";
  }
}

}  // namespace

std::string make_geometry(const int64_t inputs_shape[4], const int64_t kernel_shape[4],
                          const Settings& settings, Geometry* geometry) {
  std::string problem = check_settings(settings);
  if (problem.empty()) problem = check_shapes(inputs_shape, kernel_shape, settings);
  if (!problem.empty()) return problem;
  Geometry& g = *geometry;
  g.batch = inputs_shape[0], g.height = inputs_shape[1], g.width = inputs_shape[2],
  g.channels = inputs_shape[3];
  g.kernel_height = kernel_shape[0], g.kernel_width = kernel_shape[1], g.filters = kernel_shape[3];
  for (int axis = 0; axis < 2; ++axis) {
    g.stride[axis] = settings.stride[axis];
    g.dilation[axis] = settings.dilation[axis];
  }
  g.groups = g.channels / kernel_shape[2], g.offset_groups = settings.offset_groups;
  g.out_height = output_size(g.height, g.kernel_height, g.stride[0], g.dilation[0], settings.same,
                             settings.padding, &g.pad_top);
  g.out_width = output_size(g.width, g.kernel_width, g.stride[1], g.dilation[1], settings.same,
                            settings.padding + 2, &g.pad_left);
  // As in other convolutions, an image without pixels may have an output without pixels.
  if (g.height > 0 && g.width > 0 && (g.out_height < 1 || g.out_width < 1)) {
    return "`kernel` with its dilation must not be larger than the padded `inputs`. Received: kernel.shape=" +
           shown(kernel_shape, 4) + ", dilation_rate=" + shown(settings.dilation, 2) +
           ", inputs.shape=" + shown(inputs_shape, 4);
  }
  if (!addressable({g.kernel_height, g.kernel_width, kernel_shape[2], g.filters}) ||
      !addressable({g.batch, g.height, g.width, g.channels}) ||
      !addressable({g.batch, g.out_height, g.out_width, g.filters}) ||
      !addressable(
          {g.batch, g.out_height, g.out_width, g.offset_groups, g.kernel_height, g.kernel_width, 2})) {
    return "`inputs`, `kernel`, the offsets and the output must each have fewer than 2^58 elements. "
           "Received: inputs.shape=" +
           shown(inputs_shape, 4) + ", kernel.shape=" + shown(kernel_shape, 4);
  }
  return "";
}

int64_t output_elements(const Geometry& g) { return g.batch * g.out_pixels() * g.filters; }
int64_t mask_elements(const Geometry& g) { return g.batch * g.out_pixels() * g.offset_groups * g.taps(); }
int64_t offsets_elements(const Geometry& g) { return 2 * mask_elements(g); }

const char* instruction_set() {
  const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

std::string forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers,
                    const Workers& workers) {
  static const auto function = KERAS_DAS_CHOOSE(forward);
  return run([&] { function(dtype, geometry, buffers, workers); });
}

std::string backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers,
                     const Workers& workers) {
  static const auto function = KERAS_DAS_CHOOSE(backward);
  return run([&] { function(dtype, geometry, buffers, workers); });
}

}  // namespace keras_das

extern "C" const char* keras_das_instruction_set() { return keras_das::instruction_set(); }

// The GPU architectures of the CUDA kernels, or "" if the library has none.
extern "C" const char* keras_das_cuda_architectures() {
#if defined(KERAS_DAS_CUDA)
  return KERAS_DAS_CUDA;
#else
  return "";
#endif
}
