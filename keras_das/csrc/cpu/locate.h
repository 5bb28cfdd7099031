// Positions of samples: from offsets to the pixels and weights that each tap reads.
//
// An "entry" is a pair (offset group, tap) of an output pixel. It has one offset, one mask value and four
// corners.
#ifndef KERAS_DAS_CSRC_CPU_LOCATE_H_
#define KERAS_DAS_CSRC_CPU_LOCATE_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "deformable_conv2d.h"
#include "sampling.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

// Located taps, as one array for each property.
template <class T, class A>
class Taps {
 public:
  static constexpr int kLanes = Simd<A>::kLanes;

  explicit Taps(int64_t most)
      : capacity_(round_up(most, kLanes)), numbers_(7 * capacity_), offsets_(capacity_), flags_(capacity_) {}

  // The bilinear weights, multiplied by the mask.
  A* weight(int corner) { return numbers_.get() + corner * capacity_; }
  A* fraction_y() { return numbers_.get() + 4 * capacity_; }
  A* fraction_x() { return numbers_.get() + 5 * capacity_; }
  A* modulation() { return numbers_.get() + 6 * capacity_; }
  // The distance from the start of the image to the upper left corner, in elements of the source.
  int64_t* offset() { return offsets_.get(); }
  // Bit i is set if corner i is on the image. The order is upper left, upper right, lower left, lower right.
  typename Simd<A>::Int* on_image() { return flags_.get(); }

 private:
  int64_t capacity_;
  Scratch<A> numbers_;
  Scratch<int64_t> offsets_;
  Scratch<typename Simd<A>::Int> flags_;
};

// Pointers to the four corners of a cell whose upper left corner is `at`. `off` replaces corners off the
// image.
template <class P>
struct Corners {
  KERAS_DAS_INLINE Corners(P* at, int64_t on_image, int64_t right, int64_t down, P* off)
      : pixels{at, at + right, at + down, at + down + right} {
    if (__builtin_expect(on_image == 15, 1)) return;
    if (!(on_image & 1)) pixels[0] = off;
    if (!(on_image & 2)) pixels[1] = off;
    if (!(on_image & 4)) pixels[2] = off;
    if (!(on_image & 8)) pixels[3] = off;
  }
  P* pixels[4];
};

// The images that taps read: the inputs, or a copy of some of their channels.
template <class T>
struct Source {
  const T* pixels;
  int64_t pixel_stride, image_stride;  // in elements
};

// The inputs themselves.
template <class T>
Source<T> all_inputs(const Geometry& geometry, const void* inputs) {
  return {static_cast<const T*>(inputs), geometry.channels,
          geometry.height * geometry.width * geometry.channels};
}

// Computes the taps of output pixels. A position consists of a whole pixel and a fraction, both exact, so
// that weights keep their precision far from the origin.
template <class T, class A>
class Locator {
 public:
  Locator(const Geometry& geometry, const Source<T>& source, const void* offsets, const void* mask)
      : geometry_(geometry),
        source_(source),
        offsets_(static_cast<const A*>(offsets)),
        mask_(static_cast<const A*>(mask)),
        entries_(geometry.offset_groups * geometry.taps()),
        together_(geometry.offset_groups == 1 ? kTogether : 1),
        rest_(2 * together_ * geometry.taps()),
        zeros_(geometry.channels),
        taps_(together_ * geometry.taps()) {
    for (int64_t pixel = 0, at = 0; pixel < together_; ++pixel) {
      for (int64_t tap = 0; tap < geometry.taps(); ++tap, ++at) {
        const int64_t ky = tap / geometry.kernel_width, kx = tap % geometry.kernel_width;
        rest_y()[at] = static_cast<A>(ky * geometry.dilation[0] - geometry.pad_top);
        rest_x()[at] =
            static_cast<A>(pixel * geometry.stride[1] + kx * geometry.dilation[1] - geometry.pad_left);
      }
    }
    zeros_.zero(geometry.channels);
  }

  // Locates taps [first, first + count) of one offset group at an output pixel. `pixel` counts through the
  // batch. In `taps()` they have the indices from 0.
  void locate(int64_t pixel, int64_t offset_group, int64_t first, int64_t count) {
    if (pixel != pixel_) move_to(pixel);
    locate_entries(pixel * entries_ + offset_group * geometry_.taps() + first, first, count);
  }

  // Locates all taps of several output pixels in one row, from `pixel` and before `end`. This fills vectors
  // better than one pixel at a time. Tap t of the n-th pixel has index n * taps + t. Requires one offset
  // group. Returns the number of pixels.
  int64_t locate_row(int64_t pixel, int64_t end) {
    move_to(pixel);
    const int64_t pixels = min_of(together_, min_of(end - pixel, geometry_.out_width - column_));
    locate_entries(pixel * entries_, 0, pixels * entries_);
    return pixels;
  }

  Taps<T, A>& taps() { return taps_; }
  int64_t image() const { return image_; }
  int64_t entries() const { return entries_; }

  // The pixels that tap `t` reads, starting at channel `channel` of the source.
  KERAS_DAS_INLINE Corners<const T> corners(int64_t t, int64_t channel) {
    return Corners<const T>(pixels_ + taps_.offset()[t] + channel, taps_.on_image()[t], source_.pixel_stride,
                            geometry_.width * source_.pixel_stride, zeros_.get());
  }

 private:
  using V = Vec<A>;
  using I = Ints<A>;
  static constexpr int kLanes = Simd<A>::kLanes;

  A* rest_y() { return rest_.get(); }
  A* rest_x() { return rest_.get() + together_ * geometry_.taps(); }

  // Divides only if the pixel is not the next one in the row.
  void move_to(int64_t pixel) {
    if (pixel == pixel_ + 1 && column_ + 1 < geometry_.out_width) {
      ++column_;
    } else {
      const int64_t line = pixel / geometry_.out_width;
      column_ = pixel % geometry_.out_width;
      row_ = line % geometry_.out_height;
      image_ = line / geometry_.out_height;
      pixels_ = source_.pixels + image_ * source_.image_stride;
    }
    pixel_ = pixel;
  }

  void locate_entries(int64_t entry, int64_t tap, int64_t count) {
    const A y = static_cast<A>(row_ * geometry_.stride[0]), x = static_cast<A>(column_ * geometry_.stride[1]);
    for (int64_t done = 0; done < count; done += kLanes) {
      locate_vector(y, x, entry + done, tap + done, done, static_cast<int>(min_of(kLanes, count - done)));
    }
  }

  void locate_vector(A y, A x, int64_t entry, int64_t tap, int64_t at, int n) {
    V offset_y, offset_x;
    load_pairs(offsets_ + 2 * entry, n, &offset_y, &offset_x);
    const V modulation = mask_ ? load_first(mask_ + entry, n) : splat<A>(1);
    const V floor_y = floor<A>(offset_y), floor_x = floor<A>(offset_x);
    const V whole_y = y + load_first(rest_y() + tap, n) + floor_y;
    const V whole_x = x + load_first(rest_x() + tap, n) + floor_x;
    V fraction_y = offset_y - floor_y, fraction_x = offset_x - floor_x;
    const I inside = on_image<A>(whole_y, fraction_y, geometry_.height) &
                     on_image<A>(whole_x, fraction_x, geometry_.width);
    // Off the image, all corners are zeros, and the fraction is 0, or NaN if the offset is.
    const V elsewhere = select<A>((offset_y != offset_y) | (offset_x != offset_x), splat<A>(NAN), V{});
    fraction_y = select<A>(inside, fraction_y, elsewhere);
    fraction_x = select<A>(inside, fraction_x, elsewhere);
    V weights[4];
    corner_weights(fraction_y, fraction_x, modulation, weights);
    for (int corner = 0; corner < 4; ++corner) store(taps_.weight(corner) + at, weights[corner]);
    store(taps_.fraction_y() + at, fraction_y);
    store(taps_.fraction_x() + at, fraction_x);
    store(taps_.modulation() + at, modulation);
    // Outside: a cell whose corners are all off the image.
    store_cells(__builtin_convertvector(select<A>(inside, whole_y, splat<A>(kNowhere)), I),
                __builtin_convertvector(select<A>(inside, whole_x, splat<A>(kNowhere)), I), at);
  }

  void store_cells(I row, I column, int64_t at) {
    using Int = typename Simd<A>::Int;
    using Wide = typename Simd<A>::Wide;
    const I flags =
        corners_on_image(row, column, static_cast<Int>(geometry_.height), static_cast<Int>(geometry_.width));
    std::memcpy(taps_.on_image() + at, &flags, sizeof flags);
    const Wide pixel =
        __builtin_convertvector(row, Wide) * geometry_.width + __builtin_convertvector(column, Wide);
    const Wide offset = pixel * source_.pixel_stride;
    std::memcpy(taps_.offset() + at, &offset, sizeof offset);
  }

  static void load_pairs(const A* from, int n, V* first, V* second) {
    const int low = 2 * n < kLanes ? 2 * n : kLanes;
    unzip<A>(load_first(from, low), load_first(from + low, 2 * n - low), first, second);
  }

  const Geometry& geometry_;
  const Source<T> source_;
  const A* offsets_;
  const A* mask_;
  static constexpr int64_t kTogether = 16;

  const int64_t entries_, together_;
  Scratch<A> rest_;
  Scratch<T> zeros_;
  Taps<T, A> taps_;
  // The output pixel that was located last, and its image.
  int64_t pixel_ = -2, image_ = 0, row_ = 0, column_ = 0;
  const T* pixels_ = nullptr;
};

// The weights of a tap, each in all lanes of a vector.
template <class A>
struct Weights {
  template <class T>
  KERAS_DAS_INLINE Weights(Taps<T, A>* taps, int64_t t)
      : corners{splat<A>(taps->weight(0)[t]), splat<A>(taps->weight(1)[t]), splat<A>(taps->weight(2)[t]),
                splat<A>(taps->weight(3)[t])} {}
  Vec<A> corners[4];
};

// The interpolated values of one tap, multiplied by the mask, in `n <= lanes` channels from `channel`.
template <class T, class A>
KERAS_DAS_INLINE Vec<A> sample(const Corners<const T>& corners, const Weights<A>& weights, int64_t channel,
                               int n) {
  const auto get = [n](const T* from) { return n == Simd<A>::kLanes ? load(from) : load_first(from, n); };
  return weights.corners[0] * get(corners.pixels[0] + channel) +
         weights.corners[1] * get(corners.pixels[1] + channel) +
         weights.corners[2] * get(corners.pixels[2] + channel) +
         weights.corners[3] * get(corners.pixels[3] + channel);
}

}  // namespace
}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CPU_LOCATE_H_
