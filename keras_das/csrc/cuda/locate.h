// Positions of samples: from offsets to the pixels and weights that each tap reads.
//
// An "entry" is a pair (offset group, tap) of an output pixel. It has one offset, one mask value and four
// corners.
#ifndef KERAS_DAS_CSRC_CUDA_LOCATE_H_
#define KERAS_DAS_CSRC_CUDA_LOCATE_H_

#include <cmath>
#include <cstdint>

#include "common.h"
#include "cuda/pack.h"
#include "cuda/platform.h"
#include "deformable_conv2d.h"
#include "sampling.h"

namespace keras_das {
namespace cuda {
namespace {

// The tensors that determine the taps, and the inputs that they read.
template <class T, class A>
struct Field {
  Geometry geometry;
  int64_t taps, line;  // `line`: elements of a row of the image
  const T* inputs;
  const A* offsets;
  const A* mask;
};

// The position of one tap of one output pixel; see sampling.h.
template <class A>
struct Location {
  A weights[4];
  A y, x, modulation;
  int64_t image;
  int row, column, on_image;
};

template <class T, class A>
__device__ Location<A> locate(const Field<T, A>& field, int64_t pixel, int64_t offset_group, int64_t tap) {
  const Geometry& g = field.geometry;
  const int64_t line = quotient(pixel, g.out_width), out_column = pixel - line * g.out_width;
  const int64_t kernel_row = quotient(tap, g.kernel_width), kernel_column = tap - kernel_row * g.kernel_width;
  Location<A> found;
  found.image = quotient(line, g.out_height);
  const int64_t out_row = line - found.image * g.out_height;
  const int64_t entry = (pixel * g.offset_groups + offset_group) * field.taps + tap;
  const A offset_y = field.offsets[2 * entry], offset_x = field.offsets[2 * entry + 1];
  found.modulation = field.mask ? field.mask[entry] : A(1);
  const A floor_y = std::floor(offset_y), floor_x = std::floor(offset_x);
  const A whole_y = static_cast<A>(out_row * g.stride[0]) +
                    static_cast<A>(kernel_row * g.dilation[0] - g.pad_top) + floor_y;
  const A whole_x = static_cast<A>(out_column * g.stride[1]) +
                    static_cast<A>(kernel_column * g.dilation[1] - g.pad_left) + floor_x;
  found.y = offset_y - floor_y;
  found.x = offset_x - floor_x;
  const bool inside = on_image<A>(whole_y, found.y, g.height) & on_image<A>(whole_x, found.x, g.width);
  if (!inside) {  // all corners are zeros, and the fraction is 0, or NaN if the offset is
    const bool nan = offset_y != offset_y || offset_x != offset_x;
    found.y = found.x = nan ? static_cast<A>(NAN) : A(0);
  }
  found.row = inside ? static_cast<int>(whole_y) : kNowhere;
  found.column = inside ? static_cast<int>(whole_x) : kNowhere;
  found.on_image =
      corners_on_image(found.row, found.column, static_cast<int>(g.height), static_cast<int>(g.width));
  corner_weights(found.y, found.x, found.modulation, found.weights);
  return found;
}

// The addresses of the corners of a location. Corners off the image have the address of a corner on it or of
// the first pixel, so that all four can be loaded unconditionally.
struct Corners {
  int64_t first;  // the upper left corner, in elements
  // Bits 0 to 3: the corners that are on the image. Bits 4 and 5: whether other corners are to the right, and
  // below.
  int flags;
};

template <class A>
__device__ __forceinline__ Corners find_corners(const Geometry& g, const Location<A>& at) {
  if (!at.on_image) return {0, 0};
  const int row = at.row < 0 ? 0 : at.row, column = at.column < 0 ? 0 : at.column;
  const bool right = at.column >= 0 && at.column + 1 < g.width, below = at.row >= 0 && at.row + 1 < g.height;
  return {((at.image * g.height + row) * g.width + column) * g.channels,
          at.on_image | right << 4 | below << 5};
}

// The distances of the other corners from the upper left one: to the right, and below.
struct Steps {
  int64_t right, down;
  __device__ __forceinline__ int64_t to(int corner) const {
    return (corner & 1 ? right : 0) + (corner & 2 ? down : 0);
  }
};

template <class T, class A>
__device__ __forceinline__ Steps corner_steps(const Field<T, A>& field, int flags) {
  return {flags & 16 ? field.geometry.channels : 0, flags & 32 ? field.line : 0};
}

// Reads V channels of the four corners, the first of which is `at`. Corners off the image are 0.
template <int V, class T, class A>
__device__ __forceinline__ void read_corners(const T* at, const Steps& steps, int flags,
                                             Pack<A, V> (&pixels)[4]) {
  Pack<T, V> loaded[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) loaded[corner] = load<V>(at + steps.to(corner));
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      pixels[corner].lane[v] = flags >> corner & 1 ? to_sum(loaded[corner].lane[v]) : A(0);
    }
  }
}

// The weighted sum of the corners.
template <int V, class A>
__device__ __forceinline__ Pack<A, V> interpolate(const Pack<A, 4>& weights, const Pack<A, V> (&pixels)[4]) {
  Pack<A, V> sample;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sample.lane[v] = weights.lane[0] * pixels[0].lane[v] + weights.lane[1] * pixels[1].lane[v] +
                     weights.lane[2] * pixels[2].lane[v] + weights.lane[3] * pixels[3].lane[v];
  }
  return sample;
}

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_LOCATE_H_
