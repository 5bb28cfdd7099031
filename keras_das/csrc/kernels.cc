// The arithmetic of deformable convolution and its gradients. Compiled once for each instruction set; see
// deformable_conv2d.cc for the choice among them.
//
// In this file `k` numbers rows of a kernel seen as a matrix, k = tap * (C / groups) + channel, and an `entry` is a
// pair (offset group, tap): what one offset, one mask value and four corners belong to.
//
// Nothing here may instantiate an inline function of the standard library that other files use too: the linker keeps
// one copy, which could be the one with instructions that a processor lacks.
#include <cstdlib>

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
    if (posix_memalign(&memory_, 64, static_cast<size_t>(max_of(count, 1)) * sizeof(A))) std::abort();
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

// ------------------------------------------------------------------------------------------------ Where taps read

// One tap of one output pixel.
template <class T, class A>
struct Tap {
  const T* corner[4];    // upper left, upper right, lower left, lower right; all zeros for a corner off the image
  A weight[4];           // bilinear, times the mask
  int64_t pixel;         // of the upper left corner in its image: row * width + column
  uint32_t on_image;     // bit i: corner i lies on the image
  A fraction_y, fraction_x, modulation;
};

// Turns offsets into taps. Positions are a whole pixel and a fraction, both exact, so that weights do not lose digits
// far from the origin.
template <class T, class A>
class Locator {
 public:
  Locator(const Geometry& geometry, const void* inputs, const void* offsets, const void* mask)
      : geometry_(geometry),
        inputs_(static_cast<const T*>(inputs)),
        offsets_(static_cast<const A*>(offsets)),
        mask_(static_cast<const A*>(mask)),
        entries_(geometry.offset_groups * geometry.taps()),
        rest_(2 * geometry.taps()),
        zeros_(geometry.channels) {
    for (int64_t tap = 0; tap < geometry.taps(); ++tap) {
      rest_y()[tap] = static_cast<A>(tap / geometry.kernel_width * geometry.dilation[0] - geometry.pad_top);
      rest_x()[tap] = static_cast<A>(tap % geometry.kernel_width * geometry.dilation[1] - geometry.pad_left);
    }
    zeros_.zero(geometry.channels);
  }

  int64_t entries() const { return entries_; }

  // The taps [first, first + count) of one offset group at output `pixel`, which counts through the batch. Corners
  // point to channel 0.
  void locate(int64_t pixel, int64_t offset_group, int64_t first, int64_t count, Tap<T, A>* taps) {
    const int64_t column = pixel % geometry_.out_width, line = pixel / geometry_.out_width;
    const int64_t row = line % geometry_.out_height, image = line / geometry_.out_height;
    const T* pixels = inputs_ + image * geometry_.height * geometry_.width * geometry_.channels;
    const A y = static_cast<A>(row * geometry_.stride[0]), x = static_cast<A>(column * geometry_.stride[1]);
    const int64_t entry = pixel * entries_ + offset_group * geometry_.taps() + first;
    for (int64_t done = 0; done < count; done += kLanes) {
      const int n = static_cast<int>(min_of(kLanes, count - done));
      locate_vector(pixels, y, x, entry + done, first + done, n, taps + done);
    }
  }

 private:
  using V = Vec<A>;
  static constexpr int kLanes = Simd<A>::kLanes;

  A* rest_y() { return rest_.get(); }
  A* rest_x() { return rest_.get() + geometry_.taps(); }

  void locate_vector(const T* pixels, A y, A x, int64_t entry, int64_t tap, int n, Tap<T, A>* taps) {
    V offset_y, offset_x;
    load_pairs(offsets_ + 2 * entry, n, &offset_y, &offset_x);
    const V modulation = mask_ ? load_first(mask_ + entry, n) : splat<A>(1);
    const V floor_y = floor<A>(offset_y), floor_x = floor<A>(offset_x);
    const V whole_y = y + load_first(rest_y() + tap, n) + floor_y;
    const V whole_x = x + load_first(rest_x() + tap, n) + floor_x;
    V fraction_y = offset_y - floor_y, fraction_x = offset_x - floor_x;
    const auto inside = on_image(whole_y, fraction_y, geometry_.height) & on_image(whole_x, fraction_x, geometry_.width);
    // Off the image all corners are zeros, and the fraction is 0, or NaN where the offset was.
    const V elsewhere = select<A>((offset_y != offset_y) | (offset_x != offset_x), splat<A>(NAN), V{});
    fraction_y = select<A>(inside, fraction_y, elsewhere);
    fraction_x = select<A>(inside, fraction_x, elsewhere);
    // Outside, a cell all of whose corners are off the image.
    using Int = typename Simd<A>::Int;
    Int rows[kLanes], columns[kLanes];
    const auto safe_y = __builtin_convertvector(select<A>(inside, whole_y, splat<A>(-2)), Ints<A>);
    const auto safe_x = __builtin_convertvector(select<A>(inside, whole_x, splat<A>(-2)), Ints<A>);
    std::memcpy(rows, &safe_y, sizeof rows);
    std::memcpy(columns, &safe_x, sizeof columns);
    A weights[4][kLanes], fractions[2][kLanes], modulations[kLanes];
    const V below = fraction_y * modulation, above = (1 - fraction_y) * modulation;
    store(weights[0], above * (1 - fraction_x));
    store(weights[1], above * fraction_x);
    store(weights[2], below * (1 - fraction_x));
    store(weights[3], below * fraction_x);
    store(fractions[0], fraction_y);
    store(fractions[1], fraction_x);
    store(modulations, modulation);
    for (int i = 0; i < n; ++i) {
      Tap<T, A>& to = taps[i];
      for (int corner = 0; corner < 4; ++corner) to.weight[corner] = weights[corner][i];
      to.fraction_y = fractions[0][i];
      to.fraction_x = fractions[1][i];
      to.modulation = modulations[i];
      set_corners(pixels, rows[i], columns[i], &to);
    }
  }

  void set_corners(const T* pixels, int64_t row, int64_t column, Tap<T, A>* to) {
    to->pixel = row * geometry_.width + column;
    const T* upper = pixels + to->pixel * geometry_.channels;
    const T* lower = upper + geometry_.width * geometry_.channels;
    if (row >= 0 && row + 1 < geometry_.height && column >= 0 && column + 1 < geometry_.width) {
      to->on_image = 15;
      to->corner[0] = upper;
      to->corner[1] = upper + geometry_.channels;
      to->corner[2] = lower;
      to->corner[3] = lower + geometry_.channels;
      return;
    }
    const uint32_t top = row >= 0, bottom = row >= -1 && row + 1 < geometry_.height;
    const uint32_t left = column >= 0, right = column >= -1 && column + 1 < geometry_.width;
    to->on_image = (top & left) | (top & right) << 1 | (bottom & left) << 2 | (bottom & right) << 3;
    for (int corner = 0; corner < 4; ++corner) {
      const T* at = (corner & 2 ? lower : upper) + (corner & 1 ? geometry_.channels : 0);
      to->corner[corner] = to->on_image >> corner & 1 ? at : zeros_.get();
    }
  }

  // Whether -1 < whole + fraction < size; false for a NaN.
  static Ints<A> on_image(V whole, V fraction, int64_t size) {
    return (whole >= 0 || (whole == -1 && fraction > 0)) & (whole < static_cast<A>(size));
  }

  static void load_pairs(const A* from, int n, V* first, V* second) {
    A pairs[2 * kLanes] = {};
    std::memcpy(pairs, from, 2 * n * sizeof(A));
    A firsts[kLanes], seconds[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      firsts[i] = pairs[2 * i];
      seconds[i] = pairs[2 * i + 1];
    }
    *first = load(static_cast<const A*>(firsts));
    *second = load(static_cast<const A*>(seconds));
  }

  const Geometry& geometry_;
  const T* inputs_;
  const A* offsets_;
  const A* mask_;
  const int64_t entries_;
  Scratch<A> rest_;
  Scratch<T> zeros_;
};

// The interpolated, masked values of one tap in `n <= lanes` channels that start `channel` channels on.
template <class T, class A>
inline Vec<A> sample(const Tap<T, A>& tap, int64_t channel, int n) {
  if (n == Simd<A>::kLanes) {
    return tap.weight[0] * load(tap.corner[0] + channel) + tap.weight[1] * load(tap.corner[1] + channel) +
           tap.weight[2] * load(tap.corner[2] + channel) + tap.weight[3] * load(tap.corner[3] + channel);
  }
  return tap.weight[0] * load_first(tap.corner[0] + channel, n) +
         tap.weight[1] * load_first(tap.corner[1] + channel, n) +
         tap.weight[2] * load_first(tap.corner[2] + channel, n) +
         tap.weight[3] * load_first(tap.corner[3] + channel, n);
}

// ------------------------------------------------------------------------------------------- Depthwise, forward

// `NV` vectors of channels of one output pixel, the last of them with `last` lanes.
template <int NV, class T, class A>
inline void depthwise_channels(const Tap<T, A>* taps, int64_t count, const A* kernel, int64_t channels, const A* bias,
                               int64_t channel, int last, T* output) {
  constexpr int L = Simd<A>::kLanes;
  Vec<A> sums[NV];
  for (int v = 0; v < NV; ++v) {
    const int n = v + 1 < NV ? L : last;
    sums[v] = bias ? load_first(bias + channel + v * L, n) : Vec<A>{};
  }
  for (int64_t t = 0; t < count; ++t) {
    const A* weights = kernel + t * channels + channel;
    for (int v = 0; v + 1 < NV; ++v) sums[v] += sample(taps[t], channel + v * L, L) * load(weights + v * L);
    sums[NV - 1] += sample(taps[t], channel + (NV - 1) * L, last) * load_first(weights + (NV - 1) * L, last);
  }
  for (int v = 0; v < NV; ++v) store_first(output + channel + v * L, sums[v], v + 1 < NV ? L : last);
}

template <class T, class A>
void depthwise_forward(const Geometry& geometry, const ForwardBuffers& buffers, const Workers& workers) {
  constexpr int L = Simd<A>::kLanes;
  const int64_t channels = geometry.channels, taps = geometry.taps(), pixels = geometry.batch * geometry.out_pixels();
  const int64_t depth = channels / geometry.offset_groups;
  const A* kernel = static_cast<const A*>(buffers.kernel);
  const A* bias = static_cast<const A*>(buffers.bias);
  T* output = static_cast<T*>(buffers.output);
  const int64_t tasks = min_of(pixels, 8 * workers.threads);
  parallel(workers, tasks, [&](int64_t index) {
    Locator<T, A> locator(geometry, buffers.inputs, buffers.offsets, buffers.mask);
    Scratch<Tap<T, A>> found(taps);
    const int64_t end = part_start(pixels, tasks, index + 1);
    for (int64_t pixel = part_start(pixels, tasks, index); pixel < end; ++pixel) {
      for (int64_t group = 0; group < geometry.offset_groups; ++group) {
        locator.locate(pixel, group, 0, taps, found.get());
        const int64_t stop = (group + 1) * depth;
        for (int64_t channel = group * depth; channel < stop;) {
          const int64_t vectors = divide_up(stop - channel, L);
          const int last = static_cast<int>(stop - channel - (min_of(vectors, 4) - 1) * L);
          const auto run = [&](auto&& function) {
            function(found.get(), taps, kernel, channels, bias, channel, last > L ? L : last,
                     output + pixel * channels);
          };
          if (vectors == 1) run(depthwise_channels<1, T, A>);
          else if (vectors == 2) run(depthwise_channels<2, T, A>);
          else if (vectors == 3) run(depthwise_channels<3, T, A>);
          else run(depthwise_channels<4, T, A>);
          channel += 4 * L;
        }
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------ Matrix products

// Packs `columns` columns of a matrix with rows of `stride` elements into rows of `width`, the rest of them 0.
template <class A>
inline void pack_rows(const A* from, int64_t stride, int64_t rows, int64_t columns, int64_t width, A* panel) {
  for (int64_t k = 0; k < rows; ++k) {
    std::memcpy(panel + k * width, from + k * stride, static_cast<size_t>(columns) * sizeof(A));
    for (int64_t j = columns; j < width; ++j) panel[k * width + j] = 0;
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
void sample_columns(const Geometry& geometry, Locator<T, A>* locator, Tap<T, A>* taps, int64_t group, int64_t first,
                    int64_t last, int64_t pixel, int64_t pixels, A* tile) {
  constexpr int L = Simd<A>::kLanes;
  const int64_t depth = geometry.channels / geometry.groups, per_offsets = geometry.channels / geometry.offset_groups;
  const int64_t first_tap = first / depth, last_tap = (last - 1) / depth;
  const int64_t start = group * depth, stop = start + depth;
  for (int64_t row = 0; row < pixels; ++row) {
    for (int64_t set = start / per_offsets; set * per_offsets < stop; ++set) {
      locator->locate(pixel + row, set, first_tap, last_tap - first_tap + 1, taps);
      for (int64_t tap = first_tap; tap <= last_tap; ++tap) {
        // Channels of this tap, offset group and range of rows.
        const int64_t begin = max_of(max_of(start, set * per_offsets), start + first - tap * depth);
        const int64_t end = min_of(min_of(stop, (set + 1) * per_offsets), start + last - tap * depth);
        A* to = tile + row * kTileStride + tap * depth - first - start;
        int64_t channel = begin;
        for (; channel + L <= end; channel += L) store(to + channel, sample(taps[tap - first_tap], channel, L));
        if (channel < end) {
          const int n = static_cast<int>(end - channel);
          store_first(to + channel, sample(taps[tap - first_tap], channel, n), n);
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
    Locator<T, A> locator(geometry, buffers.inputs, buffers.offsets, buffers.mask);
    Scratch<Tap<T, A>> taps(geometry.taps());
    Scratch<A> tile(round_up(rows, kRows) * kTileStride), panel(kTileColumns * 2 * Simd<A>::kLanes);
    tile.zero(round_up(rows, kRows) * kTileStride);
    for (int64_t group = 0; group < geometry.groups; ++group) {
      T* to = static_cast<T*>(buffers.output) + first * geometry.filters + group * filters;
      OutputRows<T, A> output(to, geometry.filters, rows, filters);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = part_start(kernel_rows, blocks, block), end = part_start(kernel_rows, blocks, block + 1);
        sample_columns(geometry, &locator, taps.get(), group, begin, end, first, rows, tile.get());
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
inline void vector_gradients(const Tap<T, A>& tap, A* const (&grad_corners)[4], int64_t channel, int64_t at, int n,
                             const A* grad, const A* kernel, A* grad_kernel, Vec<A> (&products)[4]) {
  constexpr int L = Simd<A>::kLanes;
  const auto get = [n](const auto* from) { return n == L ? load(from) : load_first(from, n); };
  const auto put = [n](A* to, Vec<A> v) { n == L ? store(to, v) : store_first(to, v, n); };
  const Vec<A> upstream = get(grad + at);
  const Vec<A> of_sample = kDepthwise ? upstream * get(kernel + at) : upstream;
  Vec<A> sampled{};
  for (int corner = 0; corner < 4; ++corner) {
    const Vec<A> pixels = get(tap.corner[corner] + channel + at);
    products[corner] += pixels * of_sample;
    if (kDepthwise) sampled += tap.weight[corner] * pixels;
    A* to = grad_corners[corner] + at;
    put(to, get(static_cast<const A*>(to)) + tap.weight[corner] * of_sample);
  }
  if (kDepthwise) put(grad_kernel + at, get(static_cast<const A*>(grad_kernel + at)) + upstream * sampled);
}

// What one tap of one output pixel adds to the gradients, in `count` channels from `channel` on. `grad` is the
// gradient of the output (depthwise) or of the tap's sample (dense). Returns in `products` what the loss gains from
// each corner's pixels, for the gradients of offsets and mask.
template <bool kDepthwise, class T, class A>
inline void tap_gradients(const Tap<T, A>& tap, A* const (&grad_corners)[4], int64_t channel, int64_t count,
                          const A* grad, const A* kernel, A* grad_kernel, A* products) {
  constexpr int L = Simd<A>::kLanes;
  Vec<A> sums[4] = {};
  int64_t at = 0;
  for (; at + L <= count; at += L) {
    vector_gradients<kDepthwise>(tap, grad_corners, channel, at, L, grad, kernel, grad_kernel, sums);
  }
  if (at < count) {
    vector_gradients<kDepthwise>(tap, grad_corners, channel, at, static_cast<int>(count - at), grad, kernel,
                                 grad_kernel, sums);
  }
  sum_lanes<A>(sums, products);
}

// Gradients of one tap's offset and mask from `products`.
template <class T, class A>
inline void position_gradients(const Tap<T, A>& tap, const A* products, A* grad_offset, A* grad_mask) {
  const A y = tap.fraction_y, x = tap.fraction_x;
  const A left = products[2] - products[0], right = products[3] - products[1];
  const A upper = products[1] - products[0], lower = products[3] - products[2];
  grad_offset[0] = tap.modulation * ((1 - x) * left + x * right);
  grad_offset[1] = tap.modulation * ((1 - y) * upper + y * lower);
  if (grad_mask) {
    *grad_mask = (1 - y) * ((1 - x) * products[0] + x * products[1]) + y * ((1 - x) * products[2] + x * products[3]);
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

// What a task needs to take a slice of channels through pixels.
template <class T, class A>
class SliceTask {
 public:
  SliceTask(Backward<T, A>* pass, const Slice& slice)
      : pass_(*pass),
        slice_(slice),
        locator_(pass->geometry, pass->buffers.inputs, pass->buffers.offsets, pass->buffers.mask),
        taps_(pass->geometry.taps()),
        off_image_(kSlice),
        products_(4 * pass->geometry.taps()) {}

  void zero_grad_inputs(int64_t first_image, int64_t last_image) {
    const Geometry& geometry = pass_.geometry;
    const int64_t per_image = geometry.height * geometry.width;
    for (int64_t pixel = first_image * per_image; pixel < last_image * per_image; ++pixel) {
      std::memset(grad_inputs() + pixel * geometry.channels + slice_.channel, 0,
                  static_cast<size_t>(slice_.count) * sizeof(A));
    }
  }

  // Adds one output pixel's share. Each tap's part of `grad`, `kernel` and `grad_kernel` lies its stride after the
  // one before.
  template <bool kDepthwise>
  void add_pixel(int64_t pixel, const A* grad, int64_t grad_stride, const A* kernel, int64_t kernel_stride,
                 A* grad_kernel, int64_t grad_kernel_stride) {
    const Geometry& geometry = pass_.geometry;
    const int64_t taps = geometry.taps(), image = pixel / geometry.out_pixels();
    const int64_t down = geometry.width * geometry.channels;
    A* image_gradient = grad_inputs() + image * geometry.height * down + slice_.channel;
    locator_.locate(pixel, slice_.offset_group, 0, taps, taps_.get());
    for (int64_t t = 0; t < taps; ++t) {
      const Tap<T, A>& tap = taps_.get()[t];
      A* const upper = image_gradient + tap.pixel * geometry.channels;
      A* const off = off_image_.get();
      A* const corners[4] = {tap.on_image & 1 ? upper : off, tap.on_image & 2 ? upper + geometry.channels : off,
                             tap.on_image & 4 ? upper + down : off,
                             tap.on_image & 8 ? upper + down + geometry.channels : off};
      tap_gradients<kDepthwise>(tap, corners, slice_.channel, slice_.count, grad + t * grad_stride,
                                kernel + t * kernel_stride, grad_kernel + t * grad_kernel_stride,
                                products_.get() + 4 * t);
    }
    const int64_t entry = pixel * locator_.entries() + slice_.offset_group * taps;
    A* grad_offsets = pass_.grad_offsets[slice_.ordinal] + 2 * entry;
    A* grad_mask = pass_.grad_mask[slice_.ordinal];
    for (int64_t t = 0; t < taps; ++t) {
      position_gradients(taps_.get()[t], products_.get() + 4 * t, grad_offsets + 2 * t,
                         grad_mask ? grad_mask + entry + t : nullptr);
    }
  }

 private:
  A* grad_inputs() { return static_cast<A*>(pass_.buffers.grad_inputs); }

  Backward<T, A>& pass_;
  const Slice& slice_;
  Locator<T, A> locator_;
  Scratch<Tap<T, A>> taps_;
  Scratch<A> off_image_, products_;
};

// The most runs of images that gradients of a depthwise kernel are added up in separately.
constexpr int64_t kMaxRuns = 64;

// One slice of channels through one run of images; the kernel's gradient over the run goes to `grad_kernel`.
template <class T, class A>
void depthwise_slice(Backward<T, A>* pass, const Slice& slice, int64_t first_image, int64_t last_image,
                     A* grad_kernel) {
  const Geometry& geometry = pass->geometry;
  const int64_t channels = geometry.channels, taps = geometry.taps(), count = slice.count;
  SliceTask<T, A> task(pass, slice);
  task.zero_grad_inputs(first_image, last_image);
  // Row by row, so that rounding errors of a long sum stay those of two short ones.
  Scratch<A> row_sums(taps * count);
  for (int64_t t = 0; t < taps; ++t) std::memset(grad_kernel + t * channels + slice.channel, 0, count * sizeof(A));
  const int64_t rows = geometry.out_height * last_image;
  for (int64_t row = geometry.out_height * first_image; row < rows; ++row) {
    row_sums.zero(taps * count);
    for (int64_t pixel = row * geometry.out_width; pixel < (row + 1) * geometry.out_width; ++pixel) {
      task.template add_pixel<true>(pixel, pass->grad_output + pixel * channels + slice.channel, 0,
                                    pass->kernel + slice.channel, channels, row_sums.get(), count);
    }
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < count; ++c) {
        grad_kernel[t * channels + slice.channel + c] += row_sums.get()[t * count + c];
      }
    }
  }
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
  task.zero_grad_inputs(first_image, last_image);
  Scratch<A> tile(kPixelBlock * kTileStride), panel(kTileColumns * 2 * Simd<A>::kLanes);
  Scratch<A> grad_samples(kPixelBlock * columns);
  tile.zero(kPixelBlock * kTileStride);
  const int64_t stop = last_image * geometry.out_pixels();
  for (int64_t first = first_image * geometry.out_pixels(); first < stop; first += kPixelBlock) {
    const int64_t rows = min_of(kPixelBlock, stop - first);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = part_start(filters, blocks, block), end = part_start(filters, blocks, block + 1);
      pack_rows(pass->grad_output + first * geometry.filters + slice.group * filters + begin, geometry.filters, rows,
                end - begin, kTileStride, tile.get());
      // Column j of the right-hand matrix is the kernel's row of tap j / count, channel j % count.
      const auto pack = [&](int64_t j, int64_t count, int64_t width, A* panel) {
        for (int64_t i = 0; i < width; ++i) {
          if (i >= count) {
            for (int64_t f = 0; f < end - begin; ++f) panel[f * width + i] = 0;
            continue;
          }
          const int64_t row = (j + i) / slice.count * depth + within + (j + i) % slice.count;
          const A* from = pass->kernel + row * geometry.filters + slice.group * filters + begin;
          for (int64_t f = 0; f < end - begin; ++f) panel[f * width + i] = from[f];
        }
      };
      multiply<false>(rows, end - begin, columns, tile.get(), pack, panel.get(), static_cast<const A*>(nullptr),
                      grad_samples.get(), columns, block > 0);
    }
    for (int64_t row = 0; row < rows; ++row) {
      task.template add_pixel<false>(first + row, grad_samples.get() + row * columns, slice.count, nullptr, 0, nullptr,
                                     0);
    }
  }
}

// Rows [first, last) of the kernel's gradient in one group: samples, transposed, times the gradient of the output.
template <class T, class A>
void dense_kernel_rows(Backward<T, A>* pass, int64_t group, int64_t first, int64_t last) {
  const Geometry& geometry = pass->geometry;
  const int64_t pixels = geometry.batch * geometry.out_pixels(), filters = geometry.filters / geometry.groups;
  const BackwardBuffers& buffers = pass->buffers;
  Locator<T, A> locator(geometry, buffers.inputs, buffers.offsets, buffers.mask);
  Scratch<Tap<T, A>> taps(geometry.taps());
  Scratch<A> tile(kPixelBlock * kTileStride), panel(kPixelBlock * 2 * Simd<A>::kLanes);
  tile.zero(kPixelBlock * kTileStride);
  A* to = static_cast<A*>(buffers.grad_kernel) + first * geometry.filters + group * filters;
  for (int64_t pixel = 0; pixel < pixels; pixel += kPixelBlock) {
    const int64_t count = min_of(kPixelBlock, pixels - pixel);
    sample_columns(geometry, &locator, taps.get(), group, first, last, pixel, count, tile.get());
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
