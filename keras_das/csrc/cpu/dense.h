// Convolutions that are not depthwise: samples of the inputs, multiplied by the kernel.
//
// The kernel of a group is a matrix with the rows tap * (C / groups) + channel.
#ifndef KERAS_DAS_CSRC_CPU_DENSE_H_
#define KERAS_DAS_CSRC_CPU_DENSE_H_

#include <cstdint>

#include "common.h"
#include "cpu/backward.h"
#include "cpu/locate.h"
#include "cpu/matmul.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "deformable_conv2d.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

// ----- Forward

// Computes the samples that rows [first, last) of the kernel's matrix are multiplied by, in one group, at
// output pixels [pixel, pixel + pixels). `tile` (pixels x kTileStride) receives them.
template <class T, class A>
void sample_columns(const Geometry& geometry, Locator<T, A>* locator, int64_t group, int64_t first,
                    int64_t last, int64_t pixel, int64_t pixels, A* tile) {
  constexpr int L = Simd<A>::kLanes;
  const int64_t depth = geometry.channels / geometry.groups,
                per_offsets = geometry.channels / geometry.offset_groups;
  const int64_t first_tap = first / depth, last_tap = (last - 1) / depth;
  const int64_t start = group * depth, stop = start + depth;
  for (int64_t row = 0; row < pixels; ++row) {
    for (int64_t set = start / per_offsets; set * per_offsets < stop; ++set) {
      locator->locate(pixel + row, set, first_tap, last_tap - first_tap + 1);
      for (int64_t tap = first_tap; tap <= last_tap; ++tap) {
        // The channels of this tap and offset group in the range of rows.
        const int64_t begin = max_of(max_of(start, set * per_offsets), start + first - tap * depth);
        const int64_t end = min_of(min_of(stop, (set + 1) * per_offsets), start + last - tap * depth);
        A* to = tile + row * kTileStride + begin - start + tap * depth - first;
        const Corners<const T> corners = locator->corners(tap - first_tap, begin);
        const Weights<A> weights(&locator->taps(), tap - first_tap);
        int64_t c = 0;
        for (; c + L <= end - begin; c += L) store(to + c, sample(corners, weights, c, L));
        if (c < end - begin) {
          const int n = static_cast<int>(end - begin - c);
          store_first(to + c, sample(corners, weights, c, n), n);
        }
      }
    }
  }
}

// The rows of an output that matrix products write: in place, or as sums of a wider type that `finish`
// rounds.
template <class T, class A>
struct OutputRows {
  OutputRows(T* output, int64_t stride, int64_t rows, int64_t columns)
      : output(output), output_stride(stride), rows(rows), columns(columns), sums(rows * columns) {}
  A* data() { return sums.get(); }
  int64_t stride() const { return columns; }
  void finish() {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        T* to = output + r * output_stride + c;
        *to = convert_to(sums.get()[r * columns + c], to);
      }
    }
  }
  T* output;
  int64_t output_stride, rows, columns;
  Scratch<A> sums;
};
template <class A>
struct OutputRows<A, A> {
  OutputRows(A* output, int64_t stride, int64_t, int64_t) : output(output), output_stride(stride) {}
  A* data() { return output; }
  int64_t stride() const { return output_stride; }
  void finish() {}
  A* output;
  int64_t output_stride;
};

template <class T, class A>
void dense_forward(const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers) {
  const int64_t pixels = geometry.batch * geometry.out_pixels(), depth = geometry.channels / geometry.groups;
  const int64_t kernel_rows = geometry.taps() * depth, filters = geometry.filters / geometry.groups;
  const int64_t blocks = divide_up(kernel_rows, kTileColumns);
  const A* kernel = static_cast<const A*>(buffers.kernel);
  const A* bias = static_cast<const A*>(buffers.bias);
  const int64_t strips = divide_up(pixels, kRows);
  const int64_t tasks = min_of(strips, round_up(divide_up(pixels, kPixelBlock), workers.threads));
  parallel(workers, tasks, [&](int64_t index) {
    const int64_t first = part_start(strips, tasks, index) * kRows;
    const int64_t rows = min_of(part_start(strips, tasks, index + 1) * kRows, pixels) - first;
    Locator<T, A> locator(geometry, all_inputs<T>(geometry, buffers.inputs), buffers.offsets, buffers.mask);
    Scratch<A> tile(round_up(rows, kRows) * kTileStride), panel(kTileColumns * 2 * Simd<A>::kLanes);
    tile.zero(round_up(rows, kRows) * kTileStride);
    for (int64_t group = 0; group < geometry.groups; ++group) {
      T* to = static_cast<T*>(buffers.output) + first * geometry.filters + group * filters;
      OutputRows<T, A> output(to, geometry.filters, rows, filters);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = part_start(kernel_rows, blocks, block),
                      end = part_start(kernel_rows, blocks, block + 1);
        sample_columns(geometry, &locator, group, begin, end, first, rows, tile.get());
        const A* right = kernel + begin * geometry.filters + group * filters;
        const auto pack = [&](int64_t j, int64_t count, int64_t width, A* panel) {
          pack_rows(right + j, geometry.filters, end - begin, count, width, panel);
        };
        multiply<false>(rows, end - begin, filters, tile.get(), pack, panel.get(),
                        bias ? bias + group * filters : nullptr, output.data(), output.stride(), block > 0);
      }
      output.finish();
    }
  });
}

// ----- Backward

// Processes one slice of channels of one run of images. The gradient of each block of samples is a matrix
// product for each group that has channels in the slice.
template <class T, class A>
void dense_slice(Backward<T, A>* pass, const Slice& slice, int64_t first_image, int64_t last_image) {
  const Geometry& geometry = pass->geometry;
  const int64_t taps = geometry.taps(), filters = geometry.filters / geometry.groups;
  const int64_t depth = geometry.channels / geometry.groups, columns = taps * slice.count;
  const int64_t blocks = divide_up(filters, kTileColumns);
  // Calls `f(group, at, count)` for `count` channels of each group, from channel `at` of the slice.
  const auto for_groups = [&](const auto& f) {
    for (int64_t at = 0, count = 0; at < slice.count; at += count) {
      const int64_t group = (slice.channel + at) / depth;
      count = min_of(slice.count - at, (group + 1) * depth - slice.channel - at);
      f(group, at, count);
    }
  };
  SliceTask<T, A> task(pass, slice);
  Scratch<const A*> kernel_rows(columns);  // group by group, for one tap after another
  for_groups([&](int64_t group, int64_t at, int64_t count) {
    const A** row = kernel_rows.get() + taps * at;
    const int64_t within = slice.channel + at - group * depth;
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < count; ++c) {
        *row++ = pass->kernel + (t * depth + within + c) * geometry.filters + group * filters;
      }
    }
  });
  Scratch<A> tile(kPixelBlock * kTileStride), panel(kTileColumns * 2 * Simd<A>::kLanes);
  Scratch<A> grad_samples(kPixelBlock * columns), of_group(kPixelBlock * columns);
  tile.zero(kPixelBlock * kTileStride);
  const int64_t stop = last_image * geometry.out_pixels();
  for (int64_t first = first_image * geometry.out_pixels(); first < stop; first += kPixelBlock) {
    const int64_t rows = min_of(kPixelBlock, stop - first);
    for_groups([&](int64_t group, int64_t at, int64_t count) {
      A* product = count == slice.count ? grad_samples.get() : of_group.get();
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = part_start(filters, blocks, block),
                      end = part_start(filters, blocks, block + 1);
        copy_channels(pass->grad_output + first * geometry.filters + group * filters + begin,
                      geometry.filters, tile.get(), kTileStride, rows, end - begin);
        const auto pack = [&](int64_t j, int64_t wanted, int64_t width, A* panel) {
          pack_transposed(kernel_rows.get() + taps * at + j, begin, end - begin, wanted, width, panel);
        };
        multiply<false>(rows, end - begin, taps * count, tile.get(), pack, panel.get(),
                        static_cast<const A*>(nullptr), product, taps * count, block > 0);
      }
      for (int64_t t = 0; count < slice.count && t < taps; ++t) {
        copy_channels<A>(product + t * count, taps * count, grad_samples.get() + t * slice.count + at,
                         columns, rows, count);
      }
    });
    for (int64_t row = 0; row < rows; ++row) {
      task.template add_pixel<false>(first + row, grad_samples.get() + row * columns, slice.count, nullptr,
                                     nullptr, 0);
    }
  }
  task.end_image();
}

// Computes rows [first, last) of the kernel's gradient in one group: the transposed samples times the
// gradient of the output.
template <class T, class A>
void dense_kernel_rows(Backward<T, A>* pass, int64_t group, int64_t first, int64_t last) {
  const Geometry& geometry = pass->geometry;
  const int64_t pixels = geometry.batch * geometry.out_pixels(), filters = geometry.filters / geometry.groups;
  const BackwardBuffers& buffers = pass->buffers;
  Locator<T, A> locator(geometry, all_inputs<T>(geometry, buffers.inputs), buffers.offsets, buffers.mask);
  Scratch<A> tile(kPixelBlock * kTileStride), panel(kPixelBlock * 2 * Simd<A>::kLanes);
  tile.zero(kPixelBlock * kTileStride);
  A* to = static_cast<A*>(buffers.grad_kernel) + first * geometry.filters + group * filters;
  for (int64_t pixel = 0; pixel < pixels; pixel += kPixelBlock) {
    const int64_t count = min_of(kPixelBlock, pixels - pixel);
    sample_columns(geometry, &locator, group, first, last, pixel, count, tile.get());
    const A* right = pass->grad_output + pixel * geometry.filters + group * filters;
    const auto pack = [&](int64_t j, int64_t columns, int64_t width, A* panel) {
      pack_rows(right + j, geometry.filters, count, columns, width, panel);
    };
    multiply<true>(last - first, count, filters, tile.get(), pack, panel.get(),
                   static_cast<const A*>(nullptr), to, geometry.filters, pixel > 0);
  }
}

template <class T, class A>
void dense_backward(Backward<T, A>* pass) {
  const Geometry& geometry = pass->geometry;
  const int64_t threads = pass->workers.threads, slices = pass->slices.size();
  const int64_t runs = min_of(geometry.batch, divide_up(4 * threads, slices));
  parallel(pass->workers, runs * slices, [&](int64_t index) {
    const int64_t run = index / slices;
    dense_slice(pass, pass->slices[index % slices], part_start(geometry.batch, runs, run),
                part_start(geometry.batch, runs, run + 1));
  });
  const int64_t rows = geometry.taps() * (geometry.channels / geometry.groups),
                strips = divide_up(rows, kRows);
  const int64_t most = kTileColumns / kRows;  // strips that fit into a tile
  const int64_t parts =
      min_of(strips, max_of(divide_up(strips, most), divide_up(2 * threads, geometry.groups)));
  parallel(pass->workers, geometry.groups * parts, [&](int64_t index) {
    const int64_t part = index % parts;
    dense_kernel_rows(pass, index / parts, part_start(strips, parts, part) * kRows,
                      min_of(part_start(strips, parts, part + 1) * kRows, rows));
  });
}

}  // namespace
}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CPU_DENSE_H_
