// Depthwise convolutions: one filter for each channel.
#ifndef KERAS_DAS_CSRC_CPU_DEPTHWISE_H_
#define KERAS_DAS_CSRC_CPU_DEPTHWISE_H_

#include <cstdint>
#include <cstring>

#include "common.h"
#include "cpu/backward.h"
#include "cpu/locate.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "deformable_conv2d.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

// ----- Forward

// Computes `NV` vectors of channels of one output pixel from `channel`, the last of them with `last` lanes.
// The taps have the indices [first, first + count) in the locator.
template <int NV, class T, class A>
inline void depthwise_channels(Locator<T, A>* locator, int64_t first, int64_t count, const A* kernel,
                               int64_t kernel_stride, const A* bias, int64_t channel, int last, T* output) {
  constexpr int L = Simd<A>::kLanes;
  Vec<A> sums[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    sums[v] = bias ? load_first(bias + channel + v * L, v + 1 < NV ? L : last) : Vec<A>{};
  }
  for (int64_t t = 0; t < count; ++t) {
    const A* row = kernel + t * kernel_stride + channel;
    const Corners<const T> corners = locator->corners(first + t, channel);
    const Weights<A> weights(&locator->taps(), first + t);
#pragma GCC unroll 8
    for (int v = 0; v + 1 < NV; ++v) sums[v] += sample(corners, weights, v * L, L) * load(row + v * L);
    sums[NV - 1] += sample(corners, weights, (NV - 1) * L, last) * load(row + (NV - 1) * L);
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store_first(output + channel + v * L, sums[v], v + 1 < NV ? L : last);
}

// A depthwise kernel, its rows aligned and padded to whole vectors, with its bias.
template <class A>
struct DepthwiseKernel {
  DepthwiseKernel(const Geometry& geometry, const ForwardBuffers& buffers)
      : taps(geometry.taps()),
        // One more vector, because a vector may start at any channel.
        stride(aligned_channels<A>(geometry.channels) + Simd<A>::kLanes),
        rows(taps * stride),
        bias(static_cast<const A*>(buffers.bias)) {
    rows.zero(taps * stride);
    copy_channels(static_cast<const A*>(buffers.kernel), geometry.channels, rows.get(), stride, taps,
                  geometry.channels);
  }
  int64_t taps, stride;
  Scratch<A> rows;
  const A* bias;
};

// Computes channels [channel, stop) of one output pixel, all of one offset group; see `depthwise_channels`.
template <class T, class A>
void depthwise_pixel(Locator<T, A>* locator, int64_t first, DepthwiseKernel<A>* kernel, int64_t channel,
                     int64_t stop, T* output) {
  constexpr int L = Simd<A>::kLanes, kMost = 8;  // vectors whose sums fit into registers
  using Function = void(Locator<T, A>*, int64_t, int64_t, const A*, int64_t, const A*, int64_t, int, T*);
  constexpr Function* kByVectors[kMost] = {depthwise_channels<1, T, A>, depthwise_channels<2, T, A>,
                                           depthwise_channels<3, T, A>, depthwise_channels<4, T, A>,
                                           depthwise_channels<5, T, A>, depthwise_channels<6, T, A>,
                                           depthwise_channels<7, T, A>, depthwise_channels<8, T, A>};
  const int64_t all = divide_up(stop - channel, L), blocks = divide_up(all, kMost);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t vectors = part_start(all, blocks, block + 1) - part_start(all, blocks, block);
    const int last = static_cast<int>(min_of(stop - channel - (vectors - 1) * L, L));
    kByVectors[vectors - 1](locator, first, kernel->taps, kernel->rows.get(), kernel->stride, kernel->bias,
                            channel, last, output);
    channel += vectors * L;
  }
}

// Computes output pixels [first, last), which count through the batch.
template <class T, class A>
void depthwise_pixels(const Geometry& geometry, const ForwardBuffers& buffers, const Source<T>& source,
                      DepthwiseKernel<A>* kernel, int64_t first, int64_t last) {
  const int64_t depth = geometry.channels / geometry.offset_groups;
  Locator<T, A> locator(geometry, source, buffers.offsets, buffers.mask);
  T* output = static_cast<T*>(buffers.output);
  for (int64_t pixel = first; pixel < last;) {
    if (geometry.offset_groups == 1) {
      const int64_t row = locator.locate_row(pixel, last);
      for (int64_t n = 0; n < row; ++n, ++pixel) {
        depthwise_pixel(&locator, n * kernel->taps, kernel, 0, depth, output + pixel * geometry.channels);
      }
      continue;
    }
    for (int64_t group = 0; group < geometry.offset_groups; ++group) {
      locator.locate(pixel, group, 0, kernel->taps);
      depthwise_pixel(&locator, 0, kernel, group * depth, (group + 1) * depth,
                      output + pixel * geometry.channels);
    }
    ++pixel;
  }
}

// Computes one image from an aligned copy of its inputs.
template <class T, class A>
void depthwise_image(const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers,
                     DepthwiseKernel<A>* kernel, int64_t image) {
  const int64_t channels = geometry.channels, stride = aligned_channels<T>(channels);
  const int64_t pixels = geometry.height * geometry.width, out_pixels = geometry.out_pixels();
  const T* inputs = static_cast<const T*>(buffers.inputs) + image * pixels * channels;
  Scratch<T> copy(pixels * stride);
  const int64_t parts = 4 * workers.threads;
  parallel(workers, parts, [&](int64_t part) {
    const int64_t first = part_start(pixels, parts, part), last = part_start(pixels, parts, part + 1);
    copy_channels(inputs + first * channels, channels, copy.get() + first * stride, stride, last - first,
                  channels);
  });
  parallel(workers, parts, [&](int64_t part) {
    depthwise_pixels(geometry, buffers, Source<T>{copy.get(), stride, 0}, kernel,
                     image * out_pixels + part_start(out_pixels, parts, part),
                     image * out_pixels + part_start(out_pixels, parts, part + 1));
  });
}

template <class T, class A>
void depthwise_forward(const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers) {
  DepthwiseKernel<A> kernel(geometry, buffers);
  const int64_t stride = aligned_channels<T>(geometry.channels), threads = workers.threads;
  const int64_t copy_bytes = geometry.height * geometry.width * stride * static_cast<int64_t>(sizeof(T));
  if (stride == geometry.channels || copy_bytes > kCopyBytes) {
    const int64_t pixels = geometry.batch * geometry.out_pixels(), parts = min_of(pixels, 8 * threads);
    parallel(workers, parts, [&](int64_t part) {
      depthwise_pixels(geometry, buffers, all_inputs<T>(geometry, buffers.inputs), &kernel,
                       part_start(pixels, parts, part), part_start(pixels, parts, part + 1));
    });
  } else if (geometry.batch % threads == 0 && copy_bytes * threads <= kCopyBytes) {
    const Workers alone;
    parallel(workers, geometry.batch,
             [&](int64_t image) { depthwise_image<T, A>(geometry, buffers, alone, &kernel, image); });
  } else {
    for (int64_t image = 0; image < geometry.batch; ++image) {
      depthwise_image<T, A>(geometry, buffers, workers, &kernel, image);
    }
  }
}

// ----- Backward

// The number of runs of images, at most, whose contributions to the kernel's gradient are added up
// separately.
constexpr int64_t kMaxRuns = 64;

// Processes one slice of channels of one run of images. `grad_kernel` receives the kernel's gradient over the
// run.
template <class T, class A>
void depthwise_slice(Backward<T, A>* pass, const Slice& slice, int64_t first_image, int64_t last_image,
                     A* grad_kernel) {
  const Geometry& geometry = pass->geometry;
  const int64_t channels = geometry.channels, taps = geometry.taps(),
                stride = aligned_channels<A>(slice.count);
  SliceTask<T, A> task(pass, slice);
  // The sums are computed row by row: two short sums have smaller rounding errors than one long sum.
  Scratch<A> upstream(stride), kernel(taps * stride), row_sums(taps * stride), sums(taps * stride);
  sums.zero(taps * stride);
  copy_channels(pass->kernel + slice.channel, channels, kernel.get(), stride, taps, slice.count);
  const int64_t rows = geometry.out_height * last_image;
  for (int64_t row = geometry.out_height * first_image; row < rows; ++row) {
    row_sums.zero(taps * stride);
    for (int64_t pixel = row * geometry.out_width; pixel < (row + 1) * geometry.out_width; ++pixel) {
      std::memcpy(upstream.get(), pass->grad_output + pixel * channels + slice.channel,
                  static_cast<size_t>(slice.count) * sizeof(A));
      task.template add_pixel<true>(pixel, upstream.get(), 0, kernel.get(), row_sums.get(), stride);
    }
    for (int64_t i = 0; i < taps * stride; ++i) sums.get()[i] += row_sums.get()[i];
  }
  task.end_image();
  copy_channels<A>(sums.get(), stride, grad_kernel + slice.channel, channels, taps, slice.count);
}

template <class T, class A>
void depthwise_backward(Backward<T, A>* pass) {
  const Geometry& geometry = pass->geometry;
  const int64_t runs = min_of(geometry.batch, kMaxRuns), slices = pass->slices.size();
  const int64_t weights = geometry.taps() * geometry.channels;
  Scratch<A> by_run(runs * weights);
  parallel(pass->workers, runs * slices, [&](int64_t index) {
    const int64_t run = index / slices;
    depthwise_slice(pass, pass->slices[index % slices], part_start(geometry.batch, runs, run),
                    part_start(geometry.batch, runs, run + 1), by_run.get() + run * weights);
  });
  A* grad_kernel = static_cast<A*>(pass->buffers.grad_kernel);
  for (int64_t i = 0; i < weights; ++i) {
    A sum = by_run.get()[i];
    for (int64_t run = 1; run < runs; ++run) sum += by_run.get()[run * weights + i];
    grad_kernel[i] = sum;
  }
}

}  // namespace
}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CPU_DEPTHWISE_H_
