// The arithmetic of deformable convolution and its gradients. Compiled once for each instruction set; see
// deformable_conv2d.cc for the choice among them.
//
// In this file `k` numbers rows of a kernel seen as a matrix, k = tap * (C / groups) + channel, and an `entry` is a
// pair (offset group, tap): what one offset, one mask value and four corners belong to.
//
// Nothing here may instantiate an inline function of the standard library that other files use too: the linker keeps
// one copy, which could be the one with instructions that a processor lacks.
#include <cstdlib>
#include <new>

#include "deformable_conv2d.h"
#include "simd.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

// Channels whose input gradient one task adds up. A constant, because sums over channels are taken slice by slice,
// and results must not depend on who does what.
constexpr int64_t kSlice = 32;
// Output pixels whose products a kernel's gradient takes at a time; constant for the same reason.
constexpr int64_t kPixelBlock = 240;
// Columns of the widest tile that matrix products read, and the distance between its rows: no power of two, so that
// rows do not fall on the same sets of a cache.
constexpr int64_t kTileColumns = 512;
constexpr int64_t kTileStride = kTileColumns + 16;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Where part `index` of `parts` about equal ones starts.
inline int64_t part_start(int64_t total, int64_t parts, int64_t index) {
  return total / parts * index + min_of(total % parts, index);
}

// Memory for a task, aligned to cache lines.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (posix_memalign(&memory_, 64, static_cast<size_t>(max_of(count, 1)) * sizeof(A))) throw std::bad_alloc();
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() { return static_cast<A*>(memory_); }
  void zero(int64_t count) { std::memset(memory_, 0, static_cast<size_t>(count) * sizeof(A)); }

 private:
  void* memory_ = nullptr;
};

template <class F>
void parallel(const Workers& workers, int64_t count, const F& task) {
  keras_das::parallel_for(
      workers, count, [](void* f, int64_t index) { (*static_cast<const F*>(f))(index); },
      const_cast<F*>(&task));
}

// ------------------------------------------------------------------------------------------------- Aligned copies

// Pixels whose channels do not fill whole vectors straddle cache lines, which halves the speed of reading them. Where
// it fits, the kernels work on a copy in which every pixel starts a vector. This changes no result.

// Bytes that such copies may take for one pass over one image.
constexpr int64_t kCopyBytes = int64_t{7} << 20;

template <class T>
int64_t aligned_channels(int64_t channels) {
  return round_up(channels, Simd<typename SumType<T>::type>::kLanes);
}

// memcpy for sizes of some vectors; the last one overlaps the one before.
inline void copy_bytes(const char* from, char* to, int64_t size) {
  if (size < kVectorBytes) {
    std::memcpy(to, from, static_cast<size_t>(size));
    return;
  }
  for (int64_t at = 0; at + kVectorBytes <= size; at += kVectorBytes) std::memcpy(to + at, from + at, kVectorBytes);
  std::memcpy(to + size - kVectorBytes, from + size - kVectorBytes, kVectorBytes);
}

// Copies `count` channels of `pixels` pixels; what lies between them is left alone.
template <class T>
inline void copy_channels(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t pixels, int64_t count) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    copy_bytes(reinterpret_cast<const char*>(from + pixel * from_stride),
               reinterpret_cast<char*>(to + pixel * to_stride), count * static_cast<int64_t>(sizeof(T)));
  }
}

// ------------------------------------------------------------------------------------------------ Where taps read

// The taps of one output pixel that read one offset group: an array for each property.
template <class T, class A>
class Taps {
 public:
  static constexpr int kLanes = Simd<A>::kLanes;

  explicit Taps(int64_t most) : room_(round_up(most, kLanes)), numbers_(7 * room_), offsets_(room_), flags_(room_) {}

  A* weight(int corner) { return numbers_.get() + corner * room_; }  // bilinear, times the mask
  A* fraction_y() { return numbers_.get() + 4 * room_; }
  A* fraction_x() { return numbers_.get() + 5 * room_; }
  A* modulation() { return numbers_.get() + 6 * room_; }
  // Elements of the source from the start of the image to the upper left corner's pixel.
  int64_t* offset() { return offsets_.get(); }
  // Bit i: corner i lies on the image. Upper left, upper right, lower left, lower right.
  typename Simd<A>::Int* on_image() { return flags_.get(); }

 private:
  int64_t room_;
  Scratch<A> numbers_;
  Scratch<int64_t> offsets_;
  Scratch<typename Simd<A>::Int> flags_;
};

// Pointers to the four corners of a cell in an image of P, whose upper left corner is `at`; a corner off the image is
// replaced by `off`.
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

// Images that taps read: the inputs, or a copy of some of their channels.
template <class T>
struct Source {
  const T* pixels;
  int64_t pixel_stride, image_stride;  // in elements
};

template <class T>
Source<T> all_inputs(const Geometry& geometry, const void* inputs) {
  return {static_cast<const T*>(inputs), geometry.channels, geometry.height * geometry.width * geometry.channels};
}

// Turns offsets into taps. Positions are a whole pixel and a fraction, both exact, so that weights do not lose digits
// far from the origin.
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
        rest_x()[at] = static_cast<A>(pixel * geometry.stride[1] + kx * geometry.dilation[1] - geometry.pad_left);
      }
    }
    zeros_.zero(geometry.channels);
  }

  // Finds taps [first, first + count) of one offset group at output `pixel`, which counts through the batch. In
  // `taps()` they are numbered from 0.
  void locate(int64_t pixel, int64_t offset_group, int64_t first, int64_t count) {
    if (pixel != pixel_) move_to(pixel);
    locate_entries(pixel * entries_ + offset_group * geometry_.taps() + first, first, count);
  }

  // Finds all taps of output pixels from `pixel` on that lie in one row before `end`, some at a time, for vectors are
  // filled better so. Tap t of the n-th of them is number n * taps + t. Returns how many pixels. Needs one offset group.
  int64_t locate_row(int64_t pixel, int64_t end) {
    move_to(pixel);
    const int64_t pixels = min_of(together_, min_of(end - pixel, geometry_.out_width - column_));
    locate_entries(pixel * entries_, 0, pixels * entries_);
    return pixels;
  }

  Taps<T, A>& taps() { return taps_; }
  int64_t image() const { return image_; }
  int64_t entries() const { return entries_; }

  // The pixels that tap `t` reads, from channel `channel` of the source on.
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

  // Divides only where pixels do not follow one another in a row.
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
    const I inside = on_image<A>(whole_y, fraction_y, geometry_.height) & on_image<A>(whole_x, fraction_x, geometry_.width);
    // Off the image all corners are zeros, and the fraction is 0, or NaN where the offset was.
    const V elsewhere = select<A>((offset_y != offset_y) | (offset_x != offset_x), splat<A>(NAN), V{});
    fraction_y = select<A>(inside, fraction_y, elsewhere);
    fraction_x = select<A>(inside, fraction_x, elsewhere);
    V weights[4];
    corner_weights(fraction_y, fraction_x, modulation, weights);
    for (int corner = 0; corner < 4; ++corner) store(taps_.weight(corner) + at, weights[corner]);
    store(taps_.fraction_y() + at, fraction_y);
    store(taps_.fraction_x() + at, fraction_x);
    store(taps_.modulation() + at, modulation);
    // Outside, a cell all of whose corners are off the image.
    store_cells(__builtin_convertvector(select<A>(inside, whole_y, splat<A>(kNowhere)), I),
                __builtin_convertvector(select<A>(inside, whole_x, splat<A>(kNowhere)), I), at);
  }

  void store_cells(I row, I column, int64_t at) {
    using Int = typename Simd<A>::Int;
    using Wide = typename Simd<A>::Wide;
    const I flags = corners_on_image(row, column, static_cast<Int>(geometry_.height), static_cast<Int>(geometry_.width));
    std::memcpy(taps_.on_image() + at, &flags, sizeof flags);
    const Wide pixel = __builtin_convertvector(row, Wide) * geometry_.width + __builtin_convertvector(column, Wide);
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
  // The output pixel that was located last, and the image that it reads.
  int64_t pixel_ = -2, image_ = 0, row_ = 0, column_ = 0;
  const T* pixels_ = nullptr;
};

// A tap's weights in every lane.
template <class A>
struct Weights {
  template <class T>
  KERAS_DAS_INLINE Weights(Taps<T, A>* taps, int64_t t)
      : corners{splat<A>(taps->weight(0)[t]), splat<A>(taps->weight(1)[t]), splat<A>(taps->weight(2)[t]),
                splat<A>(taps->weight(3)[t])} {}
  Vec<A> corners[4];
};

// The interpolated, masked values of one tap in `n <= lanes` channels, `channel` channels on.
template <class T, class A>
KERAS_DAS_INLINE Vec<A> sample(const Corners<const T>& corners, const Weights<A>& weights, int64_t channel, int n) {
  const auto get = [n](const T* from) { return n == Simd<A>::kLanes ? load(from) : load_first(from, n); };
  return weights.corners[0] * get(corners.pixels[0] + channel) + weights.corners[1] * get(corners.pixels[1] + channel) +
         weights.corners[2] * get(corners.pixels[2] + channel) + weights.corners[3] * get(corners.pixels[3] + channel);
}

// ------------------------------------------------------------------------------------------- Depthwise, forward

// `NV` vectors of channels of one output pixel from `channel` on, the last of them with `last` lanes. Its taps are
// numbers [first, first + count) of the locator's.
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

// A depthwise kernel with its bias, its rows aligned and padded to whole vectors.
template <class A>
struct DepthwiseKernel {
  DepthwiseKernel(const Geometry& geometry, const ForwardBuffers& buffers)
      : taps(geometry.taps()),
        stride(aligned_channels<A>(geometry.channels) + Simd<A>::kLanes),  // a vector may start at any channel
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

// Channels [channel, stop) of one output pixel, which read one offset group; see `depthwise_channels`.
template <class T, class A>
void depthwise_pixel(Locator<T, A>* locator, int64_t first, DepthwiseKernel<A>* kernel, int64_t channel, int64_t stop,
                     T* output) {
  constexpr int L = Simd<A>::kLanes, kMost = 8;  // vectors whose sums fit the registers
  using Function = void(Locator<T, A>*, int64_t, int64_t, const A*, int64_t, const A*, int64_t, int, T*);
  constexpr Function* kByVectors[kMost] = {
      depthwise_channels<1, T, A>, depthwise_channels<2, T, A>, depthwise_channels<3, T, A>,
      depthwise_channels<4, T, A>, depthwise_channels<5, T, A>, depthwise_channels<6, T, A>,
      depthwise_channels<7, T, A>, depthwise_channels<8, T, A>};
  const int64_t all = divide_up(stop - channel, L), blocks = divide_up(all, kMost);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t vectors = part_start(all, blocks, block + 1) - part_start(all, blocks, block);
    const int last = static_cast<int>(min_of(stop - channel - (vectors - 1) * L, L));
    kByVectors[vectors - 1](locator, first, kernel->taps, kernel->rows.get(), kernel->stride, kernel->bias, channel,
                            last, output);
    channel += vectors * L;
  }
}

// Output pixels [first, last), which count through the batch.
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
      depthwise_pixel(&locator, 0, kernel, group * depth, (group + 1) * depth, output + pixel * geometry.channels);
    }
    ++pixel;
  }
}

// One image through an aligned copy of it.
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
    copy_channels(inputs + first * channels, channels, copy.get() + first * stride, stride, last - first, channels);
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

// ------------------------------------------------------------------------------------------------ Matrix products

// Packs `columns` columns of a matrix with rows of `stride` elements into rows of `width`, whole vectors, the rest 0.
template <class A>
KERAS_DAS_INLINE void pack_rows(const A* from, int64_t stride, int64_t rows, int64_t columns, int64_t width, A* panel) {
  constexpr int L = Simd<A>::kLanes;
  const int64_t whole = columns / L * L;
  for (int64_t k = 0; k < rows; ++k, from += stride, panel += width) {
    for (int64_t j = 0; j < whole; j += L) store(panel + j, load(from + j));
    for (int64_t j = whole; j < width; j += L) {
      store(panel + j, load_first(from + j, static_cast<int>(j == whole ? columns - whole : 0)));
    }
  }
}

// Packs the transpose of `columns` rows, `rows` elements of each from `skip` on, into rows of `width`, the rest 0.
template <class A>
inline void pack_transposed(const A* const* from, int64_t skip, int64_t rows, int64_t columns, int64_t width,
                            A* panel) {
  constexpr int64_t kBlock = 16;  // rows of the panel that are filled together: a cache line of each row is read once
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t last = min_of(first + kBlock, rows);
    for (int64_t j = 0; j < columns; ++j) {
      const A* row = from[j] + skip;
      for (int64_t k = first; k < last; ++k) panel[k * width + j] = row[k];
    }
    for (int64_t k = first; k < last; ++k) {
      for (int64_t j = columns; j < width; ++j) panel[k * width + j] = 0;
    }
  }
}

// A register tile: `kRows` rows by `NV` vectors of columns of  left x panel, added to `output` if `add`, else to
// `bias`. `left` has kTileStride between its rows, or, transposed, its columns. `panel` is packed. Only `rows` rows
// and, of the last vector, `last` columns are written.
template <int NV, bool kTransposed, class A>
inline void product_tile(int64_t depth, const A* left, const A* panel, const A* bias, A* output, int64_t stride,
                         int rows, int last, bool add) {
  constexpr int L = Simd<A>::kLanes;
  Vec<A> sums[kRows][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> right[NV];
    for (int v = 0; v < NV; ++v) right[v] = load(panel + (k * NV + v) * L);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const A value = kTransposed ? left[k * kTileStride + r] : left[r * kTileStride + k];
      for (int v = 0; v < NV; ++v) sums[r][v] += value * right[v];
    }
  }
  Vec<A> start[NV];
  for (int v = 0; v < NV; ++v) start[v] = bias ? load_first(bias + v * L, v + 1 < NV ? L : last) : Vec<A>{};
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r == rows) break;
    for (int v = 0; v < NV; ++v) {
      A* to = output + r * stride + v * L;
      const int n = v + 1 < NV ? L : last;
      store_first(to, (add ? load_first(static_cast<const A*>(to), n) : start[v]) + sums[r][v], n);
    }
  }
}

// left (rows x depth) times right (depth x columns) into `output`; see `product_tile`. `pack(first, count, width,
// panel)` packs columns of `right` into `panel`, which has room for depth x 2 vectors.
template <bool kTransposed, class A, class Pack>
void multiply(int64_t rows, int64_t depth, int64_t columns, const A* left, const Pack& pack, A* panel, const A* bias,
              A* output, int64_t stride, bool add) {
  constexpr int64_t L = Simd<A>::kLanes;
  for (int64_t j = 0; j < columns; j += 2 * L) {
    const int64_t count = min_of(2 * L, columns - j);
    pack(j, count, count > L ? 2 * L : L, panel);
    for (int64_t r = 0; r < rows; r += kRows) {
      const A* from = kTransposed ? left + r : left + r * kTileStride;
      const A* start = bias ? bias + j : nullptr;
      const int left_rows = static_cast<int>(min_of(kRows, rows - r));
      A* to = output + r * stride + j;
      if (count > L) {
        product_tile<2, kTransposed>(depth, from, panel, start, to, stride, left_rows, static_cast<int>(count - L), add);
      } else {
        product_tile<1, kTransposed>(depth, from, panel, start, to, stride, left_rows, static_cast<int>(count), add);
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------- Dense, forward

// Samples rows [first, last) of the kernel's matrix in one group, at output pixels [pixel, pixel + pixels), into
// `tile` (pixels x kTileStride).
template <class T, class A>
void sample_columns(const Geometry& geometry, Locator<T, A>* locator, int64_t group, int64_t first, int64_t last,
                    int64_t pixel, int64_t pixels, A* tile) {
  constexpr int L = Simd<A>::kLanes;
  const int64_t depth = geometry.channels / geometry.groups, per_offsets = geometry.channels / geometry.offset_groups;
  const int64_t first_tap = first / depth, last_tap = (last - 1) / depth;
  const int64_t start = group * depth, stop = start + depth;
  for (int64_t row = 0; row < pixels; ++row) {
    for (int64_t set = start / per_offsets; set * per_offsets < stop; ++set) {
      locator->locate(pixel + row, set, first_tap, last_tap - first_tap + 1);
      for (int64_t tap = first_tap; tap <= last_tap; ++tap) {
        // Channels of this tap, offset group and range of rows.
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

// The rows of an output, as matrix products write them: in place, or in sums of a wider type that are rounded after.
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
        const int64_t begin = part_start(kernel_rows, blocks, block), end = part_start(kernel_rows, blocks, block + 1);
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

// ---------------------------------------------------------------------------------------------------------- Gradients

// Channels whose input gradient one task adds up: within one offset group and one group of a dense kernel.
struct Slice {
  int64_t group, offset_group, channel, count;
  int64_t ordinal;  // among the slices of its offset group
};

// All slices, in order of channels.
class Slices {
 public:
  Slices(const Geometry& geometry, bool depthwise) : all_(geometry.channels) {
    const int64_t depth = depthwise ? geometry.channels : geometry.channels / geometry.groups;
    const int64_t per_offsets = geometry.channels / geometry.offset_groups;
    for (int64_t channel = 0, ordinal = 0; channel < geometry.channels; ++size_) {
      const int64_t stop = min_of((channel / depth + 1) * depth, (channel / per_offsets + 1) * per_offsets);
      const int64_t count = min_of(kSlice, stop - channel);
      ordinal = channel % per_offsets ? ordinal + 1 : 0;
      all_.get()[size_] = {channel / depth, channel / per_offsets, channel, count, ordinal};
      per_offset_group_ = max_of(per_offset_group_, ordinal + 1);
      channel += count;
    }
  }
  int64_t size() const { return size_; }
  int64_t per_offset_group() const { return per_offset_group_; }
  const Slice& operator[](int64_t index) { return all_.get()[index]; }

 private:
  Scratch<Slice> all_;
  int64_t size_ = 0, per_offset_group_ = 1;
};

// Gradients for offsets and mask are sums over channels: each slice writes its share to a layer of its own, and the
// layers are added up at the end, always in the same order.
template <class A>
class Layers {
 public:
  Layers(int64_t layers, int64_t elements, void* total)
      : layers_(layers), elements_(elements), total_(static_cast<A*>(total)),
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

// One vector of channels of `tap_gradients`.
template <bool kDepthwise, class T, class A>
KERAS_DAS_INLINE void vector_gradients(const Corners<const T>& inputs, const Corners<A>& grad_inputs, const Weights<A>& weights,
                             int64_t at, int n, const A* grad, const A* kernel, A* grad_kernel,
                             Vec<A> (&products)[4]) {
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

// What one tap of one output pixel adds to the gradients, in `count` channels. `grad` is the gradient of the output
// (depthwise) or of the tap's sample (dense). Returns in `products` what the loss gains from each corner's pixels,
// for the gradients of offsets and mask.
template <bool kDepthwise, class T, class A>
KERAS_DAS_INLINE void tap_gradients(const Corners<const T>& inputs, const Corners<A>& grad_inputs, const Weights<A>& weights,
                          int64_t count, const A* grad, const A* kernel, A* grad_kernel, A* products) {
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

// Gradients of the offsets and the mask of `count` taps from their `products`, four for each.
template <class T, class A>
KERAS_DAS_INLINE void position_gradients(Taps<T, A>* taps, int64_t count, const A* products, A* grad_offsets, A* grad_mask) {
  for (int64_t t = 0; t < count; ++t, products += 4) {
    const A y = taps->fraction_y()[t], x = taps->fraction_x()[t], modulation = taps->modulation()[t];
    offset_gradients(y, x, modulation, products, grad_offsets + 2 * t, grad_offsets + 2 * t + 1);
    if (grad_mask) grad_mask[t] = mask_gradient(y, x, products);
  }
}

// Everything that the tasks of one backward pass share.
template <class T, class A>
struct Backward {
  Backward(const Geometry& geometry, const BackwardBuffers& buffers, const Workers& workers, bool depthwise)
      : geometry(geometry),
        buffers(buffers),
        workers(workers),
        kernel(static_cast<const A*>(buffers.kernel)),
        grad_output(static_cast<const A*>(buffers.grad_output)),
        slices(geometry, depthwise),
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

// What a task needs to take a slice of channels through output pixels, image after image. It works on aligned copies
// of the slice, of the inputs and of their gradient, unless they are too large.
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

  // Adds one output pixel's share. Each tap's part of `grad`, `kernel` and `grad_kernel` lies its stride after the
  // one before. Pixels come in order.
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
      tap_gradients<kDepthwise>(locator_.corners(t, channel), corners, Weights<A>(&locator_.taps(), t), slice_.count,
                                grad + t * grad_stride, kernel + t * kernel_stride, grad_kernel + t * kernel_stride,
                                products_.get() + 4 * t);
    }
    const int64_t entry = pixel * locator_.entries() + slice_.offset_group * taps;
    A* grad_mask = pass_.grad_mask[slice_.ordinal];
    position_gradients(&locator_.taps(), taps, products_.get(), pass_.grad_offsets[slice_.ordinal] + 2 * entry,
                       grad_mask ? grad_mask + entry : nullptr);
  }

  // To be called after the last pixel.
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

  // Where the slice starts in the present image of a tensor like the inputs.
  A* image_slice(void* tensor) {
    return static_cast<A*>(tensor) + image_ * image_pixels_ * pass_.geometry.channels + slice_.channel;
  }

  void begin_image(int64_t image) {
    if (image_ >= 0) end_image();
    image_ = image;
    const int64_t channels = pass_.geometry.channels;
    if (copied_) {
      const T* inputs = static_cast<const T*>(pass_.buffers.inputs) + image * image_pixels_ * channels + slice_.channel;
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
  const Slice& slice_;
  const int64_t stride_, image_pixels_;
  const bool copied_;
  Scratch<T> inputs_;
  Scratch<A> grad_inputs_;
  Locator<T, A> locator_;
  Scratch<A> off_image_, products_;
  int64_t image_ = -1;
  A* gradient_ = nullptr;  // of the slice of the present image
};

// The most runs of images that gradients of a depthwise kernel are added up in separately.
constexpr int64_t kMaxRuns = 64;

// One slice of channels through one run of images; the kernel's gradient over the run goes to `grad_kernel`.
template <class T, class A>
void depthwise_slice(Backward<T, A>* pass, const Slice& slice, int64_t first_image, int64_t last_image,
                     A* grad_kernel) {
  const Geometry& geometry = pass->geometry;
  const int64_t channels = geometry.channels, taps = geometry.taps(), stride = aligned_channels<A>(slice.count);
  SliceTask<T, A> task(pass, slice);
  // Added up row by row, so that rounding errors of a long sum stay those of two short ones.
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

// One slice of channels through one run of images: the gradient of each block's samples is a matrix product.
template <class T, class A>
void dense_slice(Backward<T, A>* pass, const Slice& slice, int64_t first_image, int64_t last_image) {
  const Geometry& geometry = pass->geometry;
  const int64_t taps = geometry.taps(), filters = geometry.filters / geometry.groups;
  const int64_t depth = geometry.channels / geometry.groups, columns = taps * slice.count;
  const int64_t blocks = divide_up(filters, kTileColumns), within = slice.channel - slice.group * depth;
  SliceTask<T, A> task(pass, slice);
  Scratch<const A*> kernel_rows(columns);  // of the slice's channels, tap after tap
  for (int64_t t = 0, j = 0; t < taps; ++t) {
    for (int64_t c = 0; c < slice.count; ++c, ++j) {
      kernel_rows.get()[j] = pass->kernel + (t * depth + within + c) * geometry.filters + slice.group * filters;
    }
  }
  Scratch<A> tile(kPixelBlock * kTileStride), panel(kTileColumns * 2 * Simd<A>::kLanes);
  Scratch<A> grad_samples(kPixelBlock * columns);
  tile.zero(kPixelBlock * kTileStride);
  const int64_t stop = last_image * geometry.out_pixels();
  for (int64_t first = first_image * geometry.out_pixels(); first < stop; first += kPixelBlock) {
    const int64_t rows = min_of(kPixelBlock, stop - first);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = part_start(filters, blocks, block), end = part_start(filters, blocks, block + 1);
      copy_channels(pass->grad_output + first * geometry.filters + slice.group * filters + begin, geometry.filters,
                    tile.get(), kTileStride, rows, end - begin);
      const auto pack = [&](int64_t j, int64_t count, int64_t width, A* panel) {
        pack_transposed(kernel_rows.get() + j, begin, end - begin, count, width, panel);
      };
      multiply<false>(rows, end - begin, columns, tile.get(), pack, panel.get(), static_cast<const A*>(nullptr),
                      grad_samples.get(), columns, block > 0);
    }
    for (int64_t row = 0; row < rows; ++row) {
      task.template add_pixel<false>(first + row, grad_samples.get() + row * columns, slice.count, nullptr, nullptr, 0);
    }
  }
  task.end_image();
}

// Rows [first, last) of the kernel's gradient in one group: samples, transposed, times the gradient of the output.
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
    multiply<true>(last - first, count, filters, tile.get(), pack, panel.get(), static_cast<const A*>(nullptr), to,
                   geometry.filters, pixel > 0);
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
  const int64_t rows = geometry.taps() * (geometry.channels / geometry.groups), strips = divide_up(rows, kRows);
  const int64_t most = kTileColumns / kRows;  // strips that a tile holds
  const int64_t parts = min_of(strips, max_of(divide_up(strips, most), divide_up(2 * threads, geometry.groups)));
  parallel(pass->workers, geometry.groups * parts, [&](int64_t index) {
    const int64_t part = index % parts;
    dense_kernel_rows(pass, index / parts, part_start(strips, parts, part) * kRows,
                      min_of(part_start(strips, parts, part + 1) * kRows, rows));
  });
}

// The sum of the output's gradient over pixels, block by block.
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

// ------------------------------------------------------------------------------------------------------------ Choices

bool is_depthwise(const Geometry& geometry) {
  return geometry.groups == geometry.channels && geometry.filters == geometry.channels;
}

template <class T>
void forward_of(const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers) {
  using A = typename SumType<T>::type;
  if (output_elements(geometry) == 0) return;
  if (is_depthwise(geometry)) depthwise_forward<T, A>(geometry, buffers, workers);
  else dense_forward<T, A>(geometry, buffers, workers);
}

template <class T>
void backward_of(const Geometry& geometry, const BackwardBuffers& buffers, const Workers& workers) {
  using A = typename SumType<T>::type;
  if (output_elements(geometry) == 0) {
    const int64_t weights = geometry.taps() * (geometry.channels / geometry.groups) * geometry.filters;
    std::memset(buffers.grad_kernel, 0, static_cast<size_t>(weights) * sizeof(A));
    if (buffers.grad_bias) std::memset(buffers.grad_bias, 0, static_cast<size_t>(geometry.filters) * sizeof(A));
    return;  // no pixels, and no offsets for them
  }
  const bool depthwise = is_depthwise(geometry);
  Backward<T, A> pass(geometry, buffers, workers, depthwise);
  if (depthwise) depthwise_backward(&pass);
  else dense_backward(&pass);
  pass.grad_offsets.add_up(workers);
  pass.grad_mask.add_up(workers);
  if (buffers.grad_bias) bias_gradient<A>(geometry, buffers, workers);
}

}  // namespace

void forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers) {
  switch (dtype) {
    case DType::kFloat16: return forward_of<Half>(geometry, buffers, workers);
    case DType::kBFloat16: return forward_of<BFloat16>(geometry, buffers, workers);
    case DType::kFloat32: return forward_of<float>(geometry, buffers, workers);
    case DType::kFloat64: return forward_of<double>(geometry, buffers, workers);
  }
}

void backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers, const Workers& workers) {
  switch (dtype) {
    case DType::kFloat16: return backward_of<Half>(geometry, buffers, workers);
    case DType::kBFloat16: return backward_of<BFloat16>(geometry, buffers, workers);
    case DType::kFloat32: return backward_of<float>(geometry, buffers, workers);
    case DType::kFloat64: return backward_of<double>(geometry, buffers, workers);
  }
}

}  // namespace KERAS_DAS_ISA
}  // namespace keras_das
