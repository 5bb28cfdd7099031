// Gradients, as far as depthwise and dense convolutions share them. See depthwise.h and dense.h for the rest.
//
// Each task processes a slice of channels. Sums over channels are therefore computed slice by slice, and the
// constants below do not depend on the number of threads, so that results do not depend on it either.
#ifndef KERAS_DAS_CSRC_CPU_BACKWARD_H_
#define KERAS_DAS_CSRC_CPU_BACKWARD_H_

#include <cstdint>
#include <cstring>

#include "common.h"
#include "cpu/locate.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "deformable_conv2d.h"
#include "sampling.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

constexpr int64_t kSlice = 32;        // channels of a slice at most
constexpr int64_t kPixelBlock = 240;  // output pixels whose contributions to a sum are added up together

// Channels of one offset group whose input gradients one task computes.
struct Slice {
  int64_t offset_group, channel, count;
  int64_t ordinal;  // among the slices of its offset group
};

// All slices, in the order of their channels.
class Slices {
 public:
  explicit Slices(const Geometry& geometry)
      : offset_groups_(geometry.offset_groups),
        channels_(geometry.channels / geometry.offset_groups),
        per_offset_group_(divide_up(channels_, kSlice)) {}
  int64_t size() const { return offset_groups_ * per_offset_group_; }
  int64_t per_offset_group() const { return per_offset_group_; }
  Slice operator[](int64_t index) const {
    const int64_t offset_group = index / per_offset_group_, ordinal = index % per_offset_group_;
    const int64_t first = ordinal * kSlice;
    return {offset_group, offset_group * channels_ + first, min_of(kSlice, channels_ - first), ordinal};
  }

 private:
  int64_t offset_groups_, channels_, per_offset_group_;  // `channels_` of an offset group
};

// The gradients of offsets and mask are sums over channels. Each slice writes its part to a separate layer,
// and the layers are added up at the end in a fixed order.
template <class A>
class Layers {
 public:
  Layers(int64_t layers, int64_t elements, void* total)
      : layers_(layers),
        elements_(elements),
        total_(static_cast<A*>(total)),
        shares_(layers > 1 && total ? layers * elements : 0) {
    if (layers > 1 && total) shares_.zero(layers * elements);
  }
  A* operator[](int64_t layer) {
    return total_ == nullptr || layers_ == 1 ? total_ : shares_.get() + layer * elements_;
  }
  void add_up(const Workers& workers) {
    if (total_ == nullptr || layers_ == 1) return;
    const int64_t parts = divide_up(elements_, 4096);
    parallel(workers, parts, [&](int64_t part) {
      for (int64_t i = part * 4096; i < min_of(elements_, (part + 1) * 4096); ++i) {
        A sum = shares_.get()[i];
        for (int64_t layer = 1; layer < layers_; ++layer) sum += shares_.get()[layer * elements_ + i];
        total_[i] = sum;
      }
    });
  }

 private:
  int64_t layers_, elements_;
  A* total_;
  Scratch<A> shares_;
};

// `tap_gradients` of one vector of `n` channels from `at`.
template <bool kDepthwise, class T, class A>
KERAS_DAS_INLINE void vector_gradients(const Corners<const T>& inputs, const Corners<A>& grad_inputs,
                                       const Weights<A>& weights, int64_t at, int n, const A* grad,
                                       const A* kernel, A* grad_kernel, Vec<A> (&products)[4]) {
  constexpr int L = Simd<A>::kLanes;
  const auto get = [n](const auto* from) { return n == L ? load(from) : load_first(from, n); };
  const auto put = [n](A* to, Vec<A> v) { n == L ? store(to, v) : store_first(to, v, n); };
  const Vec<A> upstream = get(grad + at);
  const Vec<A> of_sample = kDepthwise ? upstream * get(kernel + at) : upstream;
  Vec<A> sampled{};
  for (int corner = 0; corner < 4; ++corner) {
    const Vec<A> pixels = get(inputs.pixels[corner] + at);
    products[corner] += pixels * of_sample;
    if (kDepthwise) sampled += weights.corners[corner] * pixels;
    A* to = grad_inputs.pixels[corner] + at;
    put(to, get(static_cast<const A*>(to)) + weights.corners[corner] * of_sample);
  }
  if (kDepthwise) put(grad_kernel + at, get(static_cast<const A*>(grad_kernel + at)) + upstream * sampled);
}

// Adds the contributions of one tap of one output pixel to the gradients, in `count` channels. `grad` is the
// gradient of the output (depthwise) or of the tap's sample (dense). `products` receives the sum over
// channels of each corner's pixel times the gradient of the sample, for the gradients of offsets and mask.
template <bool kDepthwise, class T, class A>
KERAS_DAS_INLINE void tap_gradients(const Corners<const T>& inputs, const Corners<A>& grad_inputs,
                                    const Weights<A>& weights, int64_t count, const A* grad, const A* kernel,
                                    A* grad_kernel, A* products) {
  constexpr int L = Simd<A>::kLanes;
  Vec<A> sums[4] = {};
  int64_t at = 0;
  for (; at + L <= count; at += L) {
    vector_gradients<kDepthwise>(inputs, grad_inputs, weights, at, L, grad, kernel, grad_kernel, sums);
  }
  if (at < count) {
    const int n = static_cast<int>(count - at);
    vector_gradients<kDepthwise>(inputs, grad_inputs, weights, at, n, grad, kernel, grad_kernel, sums);
  }
  sum_lanes<A>(sums, products);
}

// Computes the gradients of the offsets and the mask of `count` taps from their `products`, four for each
// tap.
template <class T, class A>
KERAS_DAS_INLINE void position_gradients(Taps<T, A>* taps, int64_t count, const A* products, A* grad_offsets,
                                         A* grad_mask) {
  for (int64_t t = 0; t < count; ++t, products += 4) {
    const A y = taps->fraction_y()[t], x = taps->fraction_x()[t], modulation = taps->modulation()[t];
    offset_gradients(y, x, modulation, products, grad_offsets + 2 * t, grad_offsets + 2 * t + 1);
    if (grad_mask) grad_mask[t] = mask_gradient(y, x, products);
  }
}

// The data that all tasks of one backward pass share.
template <class T, class A>
struct Backward {
  Backward(const Geometry& geometry, const BackwardBuffers& buffers, const Workers& workers)
      : geometry(geometry),
        buffers(buffers),
        workers(workers),
        kernel(static_cast<const A*>(buffers.kernel)),
        grad_output(static_cast<const A*>(buffers.grad_output)),
        slices(geometry),
        grad_offsets(slices.per_offset_group(), offsets_elements(geometry), buffers.grad_offsets),
        grad_mask(slices.per_offset_group(), mask_elements(geometry), buffers.grad_mask) {}

  const Geometry& geometry;
  const BackwardBuffers& buffers;
  const Workers& workers;
  const A* kernel;
  const A* grad_output;
  Slices slices;
  Layers<A> grad_offsets, grad_mask;
};

// Computes the gradients of a slice of channels, for one output pixel after another. Works on aligned copies
// of this slice of the inputs and of their gradient, unless they are too large.
template <class T, class A>
class SliceTask {
 public:
  SliceTask(Backward<T, A>* pass, const Slice& slice)
      : pass_(*pass),
        slice_(slice),
        stride_(aligned_channels<T>(slice.count)),
        image_pixels_(pass->geometry.height * pass->geometry.width),
        copied_(image_pixels_ * stride_ * static_cast<int64_t>(sizeof(T) + sizeof(A)) <= kCopyBytes),
        inputs_(copied_ ? image_pixels_ * stride_ : 0),
        grad_inputs_(copied_ ? image_pixels_ * stride_ : 0),
        locator_(pass->geometry, source(), pass->buffers.offsets, pass->buffers.mask),
        off_image_(kSlice),
        products_(4 * pass->geometry.taps()) {}

  // Adds the contributions of one output pixel. `grad`, `kernel` and `grad_kernel` have one row for each tap,
  // at a distance of their stride. Pixels must be added in order.
  template <bool kDepthwise>
  void add_pixel(int64_t pixel, const A* grad, int64_t grad_stride, const A* kernel, A* grad_kernel,
                 int64_t kernel_stride) {
    const Geometry& geometry = pass_.geometry;
    const int64_t taps = geometry.taps();
    locator_.locate(pixel, slice_.offset_group, 0, taps);
    if (locator_.image() != image_) begin_image(locator_.image());
    const int64_t right = copied_ ? stride_ : geometry.channels, channel = copied_ ? 0 : slice_.channel;
    for (int64_t t = 0; t < taps; ++t) {
      const Corners<A> corners(gradient_ + locator_.taps().offset()[t], locator_.taps().on_image()[t], right,
                               right * geometry.width, off_image_.get());
      tap_gradients<kDepthwise>(locator_.corners(t, channel), corners, Weights<A>(&locator_.taps(), t),
                                slice_.count, grad + t * grad_stride, kernel + t * kernel_stride,
                                grad_kernel + t * kernel_stride, products_.get() + 4 * t);
    }
    const int64_t entry = pixel * locator_.entries() + slice_.offset_group * taps;
    A* grad_mask = pass_.grad_mask[slice_.ordinal];
    position_gradients(&locator_.taps(), taps, products_.get(),
                       pass_.grad_offsets[slice_.ordinal] + 2 * entry,
                       grad_mask ? grad_mask + entry : nullptr);
  }

  // Must be called after the last pixel.
  void end_image() {
    if (copied_) {
      copy_channels<A>(gradient_, stride_, image_slice(pass_.buffers.grad_inputs), pass_.geometry.channels,
                       image_pixels_, slice_.count);
    }
  }

 private:
  Source<T> source() {
    if (copied_) return {inputs_.get(), stride_, 0};
    return all_inputs<T>(pass_.geometry, pass_.buffers.inputs);
  }

  // The start of the slice in the current image of a tensor with the shape of the inputs.
  A* image_slice(void* tensor) {
    return static_cast<A*>(tensor) + image_ * image_pixels_ * pass_.geometry.channels + slice_.channel;
  }

  void begin_image(int64_t image) {
    if (image_ >= 0) end_image();
    image_ = image;
    const int64_t channels = pass_.geometry.channels;
    if (copied_) {
      const T* inputs =
          static_cast<const T*>(pass_.buffers.inputs) + image * image_pixels_ * channels + slice_.channel;
      copy_channels(inputs, channels, inputs_.get(), stride_, image_pixels_, slice_.count);
      gradient_ = grad_inputs_.get();
      grad_inputs_.zero(image_pixels_ * stride_);
      return;
    }
    gradient_ = image_slice(pass_.buffers.grad_inputs);
    for (int64_t pixel = 0; pixel < image_pixels_; ++pixel) {
      std::memset(gradient_ + pixel * channels, 0, static_cast<size_t>(slice_.count) * sizeof(A));
    }
  }

  Backward<T, A>& pass_;
  const Slice slice_;
  const int64_t stride_, image_pixels_;
  const bool copied_;
  Scratch<T> inputs_;
  Scratch<A> grad_inputs_;
  Locator<T, A> locator_;
  Scratch<A> off_image_, products_;
  int64_t image_ = -1;
  A* gradient_ = nullptr;  // of the slice in the current image
};

// The gradient of the bias: the sum of the output's gradient over pixels, block by block.
template <class A>
void bias_gradient(const Geometry& geometry, const BackwardBuffers& buffers, const Workers& workers) {
  constexpr int64_t L = Simd<A>::kLanes;
  const int64_t pixels = geometry.batch * geometry.out_pixels(), filters = geometry.filters;
  const A* grad_output = static_cast<const A*>(buffers.grad_output);
  A* grad_bias = static_cast<A*>(buffers.grad_bias);
  parallel(workers, divide_up(filters, L), [&](int64_t index) {
    const int n = static_cast<int>(min_of(L, filters - index * L));
    Vec<A> total{};
    for (int64_t first = 0; first < pixels; first += kPixelBlock) {
      Vec<A> sum{};
      for (int64_t pixel = first; pixel < min_of(pixels, first + kPixelBlock); ++pixel) {
        sum += load_first(grad_output + pixel * filters + index * L, n);
      }
      total += sum;
    }
    store_first(grad_bias + index * L, total, n);
  });
}

}  // namespace
}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CPU_BACKWARD_H_
