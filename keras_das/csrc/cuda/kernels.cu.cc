// Deformable convolution and its gradients on NVIDIA GPUs: the launches of the kernels in the headers of this
// folder.
//
// A convolution that is not depthwise uses "columns" in working memory: the samples of some output pixels,
// (pixels, taps, channels), or their gradients. Matrix products do the rest.
#define KERAS_DAS_ISA cuda
#define KERAS_DAS_SLOW_DIVISION  // of 64-bit numbers

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

#include "common.h"
#include "cuda/backward.h"
#include "cuda/device.h"
#include "cuda/forward.h"
#include "cuda/gather.h"
#include "cuda/locate.h"
#include "cuda/matmul.h"
#include "cuda/platform.h"
#include "cuda/sums.h"
#include "deformable_conv2d_cuda.h"
#include "sampling.h"

namespace keras_das {
namespace cuda {
namespace {

constexpr int64_t kLeastPixels = 8;  // of a part of the pixels that a block processes

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return std::max(low, std::min(value, high));
}

// The number of elements of type E that threads load at once. It divides `channels`, has at most 16 bytes,
// and leaves work for half a warp. It is 1 unless all pointers are aligned to 16 bytes.
template <class E>
int pack_width(int64_t channels, std::initializer_list<const void*> pointers) {
  for (int width = 16 / static_cast<int>(sizeof(E)); width > 1; width /= 2) {
    if (channels % width || channels / width < kWarp / 2) continue;
    if (std::all_of(pointers.begin(), pointers.end(),
                    [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; })) {
      return width;
    }
  }
  return 1;
}

template <class T, class A, bool kDepthwise>
auto sampling_kernel(int width) -> void (*)(Samples<T, A>) {
  if constexpr (sizeof(T) == 2) {
    if (width == 8) return sample_pixels<T, A, 8, kDepthwise>;
  }
  if constexpr (sizeof(T) <= 4) {
    if (width == 4) return sample_pixels<T, A, 4, kDepthwise>;
  }
  return width == 2 ? sample_pixels<T, A, 2, kDepthwise> : sample_pixels<T, A, 1, kDepthwise>;
}

template <class T, class A, bool kDepthwise>
auto gradient_kernel(int width) -> void (*)(Gradients<T, A>) {
  if constexpr (sizeof(A) == 4) {
    if (width == 4) return tap_gradients<T, A, 4, kDepthwise>;
  }
  return width == 2 ? tap_gradients<T, A, 2, kDepthwise> : tap_gradients<T, A, 1, kDepthwise>;
}

template <class A, bool kDepthwise>
auto gathering_kernel(int width) -> void (*)(Gathering<A>) {
  if constexpr (sizeof(A) == 4) {
    if (width == 4) return gather_gradients<A, 4, kDepthwise>;
  }
  return width == 2 ? gather_gradients<A, 2, kDepthwise> : gather_gradients<A, 1, kDepthwise>;
}

// Calls `f(first, pixels)` for runs of output pixels that need about `bytes` of working memory. A run
// consists of whole images, or of a part of one image, so that the results of an image do not depend on the
// rest of the batch.
template <class F>
void for_each_run(const Geometry& g, int64_t bytes_per_pixel, int64_t bytes, const F& f) {
  const int64_t all = g.batch * g.out_pixels(), most = std::max<int64_t>(bytes / bytes_per_pixel, 1);
  const int64_t run = most < g.out_pixels() ? most : most / g.out_pixels() * g.out_pixels();
  for (int64_t first = 0, pixels; first < all; first += pixels) {
    pixels = std::min(run, all - first);
    if (run < g.out_pixels()) pixels = std::min(pixels, g.out_pixels() - first % g.out_pixels());
    f(first, pixels);
  }
}

// Computes the sums over `rows` rows, in a fixed order.
template <class A>
void sum_rows(const Device& device, const A* from, int64_t rows, int64_t columns, A* to) {
  const int64_t strips = divide_up(columns, kWarp);
  const int64_t fits = device.workspace_bytes() / (columns * int64_t{sizeof(A)});
  const int64_t parts = clamp(rows / 64, 1, std::max<int64_t>(1, std::min<int64_t>(256, fits)));
  A* sums = parts > 1 ? device.allocate<A>(parts * columns) : to;
  device.launch(add_rows<A>, strips * parts, Rows<A>{from, rows, columns, parts, sums});
  if (parts > 1) device.launch(add_rows<A>, strips, Rows<A>{sums, parts, columns, 1, to});
}

template <class T, class A>
Field<T, A> make_field(const Device& device, const Geometry& g, const void* inputs, const void* offsets,
                       const void* mask) {
  // Kernels load corners off the image from the first pixel and ignore the values; see `Corners`.
  if (g.height * g.width == 0) inputs = device.allocate<T>(g.channels);
  return {g,
          g.taps(),
          g.width * g.channels,
          static_cast<const T*>(inputs),
          static_cast<const A*>(offsets),
          static_cast<const A*>(mask)};
}

template <bool kDepthwise, class T, class A>
void take_samples(const Device& device, Samples<T, A> samples) {
  const Geometry& g = samples.field.geometry;
  const int64_t most = std::max<int64_t>(kEntries / samples.field.taps, 1);
  samples.tile = clamp(samples.pixels * g.offset_groups / kBlocks, 1, most);
  const int width =
      pack_width<T>(g.channels / g.offset_groups,
                    {samples.field.inputs, samples.kernel, samples.bias, samples.output, samples.columns});
  device.launch(sampling_kernel<T, A, kDepthwise>(width),
                divide_up(samples.pixels, samples.tile) * g.offset_groups, samples);
}

template <class A>
int64_t count_tiles(int64_t rows, int64_t columns) {
  return divide_up(rows, kTileRows<A>) * divide_up(columns, kTileColumns<A>);
}

template <template <class, class> class P, class T, class A>
void take_product(const Device& device, const Operands<T, A>& a) {
  using Kind = P<T, A>;
  const Group<T, A> group(a);
  const int64_t tiles = count_tiles<A>(Kind::rows(a, group), Kind::columns(a, group));
  device.launch(multiply<T, A, Kind>, tiles * a.groups * a.parts, a);
}

template <class T, class A>
Operands<T, A> make_operands(const Geometry& g, const void* kernel) {
  Operands<T, A> a{};
  a.taps = g.taps(), a.channels = g.channels, a.filters = g.filters, a.groups = g.groups, a.parts = 1;
  a.kernel = static_cast<const A*>(kernel);
  return a;
}

// Working memory for the columns of the pixels of one run; see `for_each_run`.
template <class A>
struct Columns {
  Columns(const Device& device, const Geometry& g)
      : bytes_per_pixel(g.taps() * g.channels * int64_t{sizeof(A)}) {
    const int64_t pixels = clamp(device.workspace_bytes() / bytes_per_pixel, 1, g.batch * g.out_pixels());
    memory = device.allocate<A>(pixels * g.taps() * g.channels);
  }
  int64_t bytes_per_pixel;
  A* memory;
};

// ----- Forward

template <class T, class A>
void dense_forward(const Device& device, const Geometry& g, const ForwardBuffers& buffers) {
  const Columns<A> columns(device, g);
  Samples<T, A> samples{};
  samples.field = make_field<T, A>(device, g, buffers.inputs, buffers.offsets, buffers.mask);
  samples.columns = columns.memory;
  Operands<T, A> operands = make_operands<T, A>(g, buffers.kernel);
  operands.columns = columns.memory;
  operands.bias = static_cast<const A*>(buffers.bias);
  for_each_run(g, columns.bytes_per_pixel, device.workspace_bytes(), [&](int64_t first, int64_t pixels) {
    samples.first = first;
    samples.pixels = operands.pixels = pixels;
    operands.output = static_cast<T*>(buffers.output) + first * g.filters;
    take_samples<false>(device, samples);
    take_product<OutputProduct>(device, operands);
  });
}

template <class T>
void forward_of(const Device& device, const Geometry& g, const ForwardBuffers& buffers) {
  using A = typename SumType<T>::type;
  if (output_elements(g) == 0) return;
  if (!is_depthwise(g)) return dense_forward<T, A>(device, g, buffers);
  Samples<T, A> samples{};
  samples.field = make_field<T, A>(device, g, buffers.inputs, buffers.offsets, buffers.mask);
  samples.pixels = g.batch * g.out_pixels();
  samples.kernel = static_cast<const A*>(buffers.kernel);
  samples.bias = static_cast<const A*>(buffers.bias);
  samples.output = static_cast<T*>(buffers.output);
  take_samples<true>(device, samples);
}

// ----- Backward

// Computes the gradients of `tap_gradients`, for as many channels at a time as a block has threads.
template <bool kDepthwise, class T, class A>
void take_gradients(const Device& device, Gradients<T, A> a) {
  const Geometry& g = a.field.geometry;
  const int64_t depth = g.channels / g.offset_groups, tap_runs = divide_up(a.field.taps, kTaps);
  const int width = pack_width<A>(depth, {a.field.inputs, a.kernel, a.grad_output, a.columns, a.grad_inputs});
  const int64_t together = int64_t{kThreads} * width;
  for (a.skip = 0; a.skip < depth; a.skip += together) {
    a.channels = std::min(together, depth - a.skip);
    const int warps = static_cast<int>(divide_up(a.channels, width * kWarp));
    device.launch(gradient_kernel<T, A, kDepthwise>(width), a.ranges * g.offset_groups * tap_runs, a,
                  warps * kWarp, int64_t{kGradientEntries} * warps * 4 * int64_t{sizeof(A)});
  }
}

// The number of parts of the pixels, at most `most`, that blocks process.
int64_t count_ranges(const Geometry& g, int64_t pixels, int64_t most) {
  const int64_t others = g.offset_groups * divide_up(g.taps(), kTaps);
  return clamp(std::min(kBlocks / others, pixels / kLeastPixels), 1, std::max<int64_t>(most, 1));
}

// The lists of gather.h, with their working memory.
template <class A>
class Gatherer {
 public:
  Gatherer(const Device& device, const Geometry& g, const BackwardBuffers& buffers) : device_(device) {
    if (g.taps() > INT_MAX) throw std::runtime_error("more than 2^31 taps cannot be sorted");
    lists_.field = make_field<A, A>(device_, g, nullptr, buffers.offsets, buffers.mask);
    lists_.cells = (g.height + 1) * (g.width + 1);
    const int64_t of_entries =
        (2 * int64_t{sizeof(int)} + 4 * int64_t{sizeof(A)}) * g.offset_groups * g.taps();
    const int64_t of_cells = 2 * int64_t{sizeof(int)} * g.offset_groups * lists_.cells;
    bytes_per_pixel_ = of_entries + divide_up(of_cells, g.out_pixels());
  }

  int64_t bytes_per_pixel() const { return bytes_per_pixel_; }

  // Computes the gradient of the inputs of whole images, or adds the contributions of a part of an image.
  template <bool kDepthwise>
  void gather(int64_t first, int64_t pixels, Gathering<A> gathering) {
    const Geometry& g = lists_.field.geometry;
    const int64_t taps = lists_.field.taps, entries = pixels * g.offset_groups * taps;
    lists_.first = first, lists_.pixels = pixels;
    lists_.image = first / g.out_pixels();
    lists_.images = divide_up(pixels, g.out_pixels());
    lists_.capacity = std::min(pixels, g.out_pixels()) * taps;
    prepare(entries, lists_.images * g.offset_groups * lists_.cells);
    device_.zero(lists_.ends, lists_.images * g.offset_groups * lists_.cells);
    const int64_t blocks = divide_up(entries, kThreads);
    device_.launch(sort_entries<A, Step::kCount>, blocks, lists_);
    device_.launch(start_lists<A>, lists_.images * g.offset_groups, lists_);
    device_.launch(sort_entries<A, Step::kFill>, blocks, lists_);
    device_.launch(sort_entries<A, Step::kSort>, blocks, lists_);
    gathering.lists = lists_;
    gathering.add = first % g.out_pixels() != 0;
    const int width = pack_width<A>(g.channels / g.offset_groups, {gathering.kernel, gathering.grad_output,
                                                                   gathering.columns, gathering.grad_inputs});
    device_.launch(gathering_kernel<A, kDepthwise>(width),
                   divide_up(lists_.images * g.height * g.width * (g.channels / width), kThreads), gathering);
  }

 private:
  // The first run of pixels is the largest.
  void prepare(int64_t entries, int64_t cells) {
    if (lists_.starts) return;
    lists_.starts = device_.allocate<int>(cells);
    lists_.ends = device_.allocate<int>(cells);
    lists_.unsorted = device_.allocate<int>(entries);
    lists_.sorted = device_.allocate<int>(entries);
    lists_.weights = device_.allocate<A>(4 * entries);
  }

  const Device& device_;
  Lists<A> lists_{};
  int64_t bytes_per_pixel_;
};

template <class T, class A>
Gradients<T, A> make_gradients(const Device& device, const Geometry& g, const BackwardBuffers& buffers) {
  Gradients<T, A> a{};
  a.field = make_field<T, A>(device, g, buffers.inputs, buffers.offsets, buffers.mask);
  a.grad_inputs = device.deterministic() ? nullptr : static_cast<A*>(buffers.grad_inputs);
  a.grad_offsets = static_cast<A*>(buffers.grad_offsets);
  a.grad_mask = static_cast<A*>(buffers.grad_mask);
  return a;
}

template <class T, class A>
void depthwise_backward(const Device& device, const Geometry& g, const BackwardBuffers& buffers) {
  Gradients<T, A> a = make_gradients<T, A>(device, g, buffers);
  const int64_t weights = g.taps() * g.channels;
  a.pixels = g.batch * g.out_pixels();
  a.ranges = count_ranges(g, a.pixels, device.workspace_bytes() / (weights * int64_t{sizeof(A)}));
  a.kernel = static_cast<const A*>(buffers.kernel);
  a.grad_output = static_cast<const A*>(buffers.grad_output);
  a.kernel_shares = device.allocate<A>(a.ranges * weights);
  take_gradients<true>(device, a);
  sum_rows(device, a.kernel_shares, a.ranges, weights, static_cast<A*>(buffers.grad_kernel));
  if (!device.deterministic()) return;
  Gatherer<A> gatherer(device, g, buffers);
  Gathering<A> gathering{};
  gathering.kernel = a.kernel;
  gathering.grad_output = a.grad_output;
  gathering.grad_inputs = static_cast<A*>(buffers.grad_inputs);
  for_each_run(g, gatherer.bytes_per_pixel(), device.workspace_bytes(), [&](int64_t first, int64_t pixels) {
    gatherer.template gather<true>(first, pixels, gathering);
  });
}

template <class T, class A>
void dense_backward(const Device& device, const Geometry& g, const BackwardBuffers& buffers) {
  const Columns<A> columns(device, g);
  Gradients<T, A> a = make_gradients<T, A>(device, g, buffers);
  a.columns = columns.memory;
  Gatherer<A> gatherer(device, g, buffers);
  Gathering<A> gathering{};
  gathering.columns = columns.memory;
  gathering.grad_inputs = static_cast<A*>(buffers.grad_inputs);
  Operands<T, A> operands = make_operands<T, A>(g, buffers.kernel);
  operands.columns = columns.memory;
  const int64_t rows = g.taps() * (g.channels / g.groups), weights = rows * g.filters;
  const int64_t tiles = count_tiles<A>(rows, g.filters / g.groups) * g.groups;
  const int64_t fits = device.workspace_bytes() / (weights * int64_t{sizeof(A)});
  const int64_t parts = clamp(kBlocks / 2 / tiles, 1, clamp(fits, 1, 64));
  A* grad_kernel = static_cast<A*>(buffers.grad_kernel);
  operands.grad_kernel = parts > 1 ? device.allocate<A>(parts * weights) : grad_kernel;
  const int64_t per_pixel =
      std::max(columns.bytes_per_pixel, device.deterministic() ? gatherer.bytes_per_pixel() : 0);
  for_each_run(g, per_pixel, device.workspace_bytes(), [&](int64_t first, int64_t pixels) {
    a.first = first;
    a.pixels = operands.pixels = pixels;
    a.ranges = count_ranges(g, pixels, kBlocks);
    operands.grad_output = static_cast<const A*>(buffers.grad_output) + first * g.filters;
    operands.parts = 1;
    take_product<ColumnGradients>(device, operands);
    if (device.deterministic()) gatherer.template gather<false>(first, pixels, gathering);
    take_gradients<false>(device, a);
    operands.parts = parts;
    operands.add = first > 0;
    take_product<KernelGradients>(device, operands);
  });
  if (parts > 1) sum_rows(device, operands.grad_kernel, parts, weights, grad_kernel);
}

template <class T>
void backward_of(const Device& device, const Geometry& g, const BackwardBuffers& buffers) {
  using A = typename SumType<T>::type;
  const int64_t pixels = g.batch * g.out_pixels();
  A* grad_bias = static_cast<A*>(buffers.grad_bias);
  if (pixels == 0) {
    device.zero(static_cast<A*>(buffers.grad_kernel), g.taps() * (g.channels / g.groups) * g.filters);
    if (grad_bias) device.zero(grad_bias, g.filters);
    return;  // there are neither pixels nor offsets
  }
  if (!device.deterministic()) {
    device.zero(static_cast<A*>(buffers.grad_inputs), g.batch * g.height * g.width * g.channels);
  }
  if (is_depthwise(g)) depthwise_backward<T, A>(device, g, buffers);
  else dense_backward<T, A>(device, g, buffers);
  if (grad_bias) sum_rows(device, static_cast<const A*>(buffers.grad_output), pixels, g.filters, grad_bias);
}

template <class F>
std::string run(const F& function) {
  try {
    function();
    return "";
  } catch (const std::bad_alloc&) {
    return "out of memory: there is none on the host";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

#if defined(__CUDACC__)
// The reason why no kernel can run on the thread's device, or "". The driver may be too old for this CUDA
// runtime, or there may be no kernels for the architecture of the GPU.
const char* find_problem() {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, add_rows<float>);
  cudaGetLastError();  // clears the error, which launches would report
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
#endif

}  // namespace
}  // namespace cuda

std::string cuda_forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers,
                         const CudaCall& call) {
  const cuda::Device device(call);
  return cuda::run([&] {
    switch (dtype) {
      case DType::kFloat16: return cuda::forward_of<cuda::Half>(device, geometry, buffers);
      case DType::kBFloat16: return cuda::forward_of<cuda::BFloat16>(device, geometry, buffers);
      case DType::kFloat32: return cuda::forward_of<float>(device, geometry, buffers);
      case DType::kFloat64: return cuda::forward_of<double>(device, geometry, buffers);
    }
  });
}

std::string cuda_backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers,
                          const CudaCall& call) {
  const cuda::Device device(call);
  return cuda::run([&] {
    switch (dtype) {
      case DType::kFloat16: return cuda::backward_of<cuda::Half>(device, geometry, buffers);
      case DType::kBFloat16: return cuda::backward_of<cuda::BFloat16>(device, geometry, buffers);
      case DType::kFloat32: return cuda::backward_of<float>(device, geometry, buffers);
      case DType::kFloat64: return cuda::backward_of<double>(device, geometry, buffers);
    }
  });
}

}  // namespace keras_das

#if defined(__CUDACC__)
extern "C" const char* keras_das_cuda_problem() { return keras_das::cuda::find_problem(); }
#endif
