// Deformable convolution and its gradients on NVIDIA GPUs. nvcc compiles this file; a C++ compiler does so too, against
// cuda_on_host.h, for tests of what kernels index.
//
// As in kernels.cc, an `entry` is a pair (offset group, tap) at an output pixel: what one offset, one mask value and
// four corners belong to. Threads lie along channels. A block finds where the taps of some pixels read, keeps that in
// shared memory, and then takes all channels through it.
//
// A convolution that is not depthwise goes through `columns`: the samples of some output pixels, (pixels, taps,
// channels), or their gradients, in working memory. A matrix product does the rest.
#define KERAS_DAS_ISA cuda
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <mma.h>
#else
#include "cuda_on_host.h"
#endif

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <stdexcept>

#include "deformable_conv2d_cuda.h"
#include "sampling.h"

namespace keras_das {
namespace cuda {
namespace {

namespace wmma = nvcuda::wmma;

// Tensor cores take TF32 from compute capability 8.0 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define KERAS_DAS_TENSOR_CORES 0
#else
#define KERAS_DAS_TENSOR_CORES 1
#endif

constexpr int kWarp = 32;
constexpr int kThreads = 256;        // of a block
constexpr int kEntries = 256;        // that a block of the forward pass keeps
constexpr int kGradientEntries = 144;  // that a block of the backward pass keeps, with what their gradients need
constexpr int kTaps = 9;             // whose kernel gradients a thread adds up in registers
constexpr int64_t kBlocks = 2048;    // enough to fill a GPU some times over; also where sums are cut into parts
constexpr int64_t kLeastPixels = 8;  // of such a part

// -------------------------------------------------------------------------------------------------- Numbers and memory

template <class I>
__device__ __forceinline__ I least(I a, I b) {
  return a < b ? a : b;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t clamp(int64_t value, int64_t low, int64_t high) { return std::max(low, std::min(value, high)); }

// a / b of numbers that are not negative. Dividing 64-bit numbers is slow on GPUs.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Where part `index` of `parts` about equal ones starts.
__device__ __forceinline__ int64_t part_start(int64_t total, int64_t parts, int64_t index) {
  const int64_t size = quotient(total, parts);
  return size * index + least(total - size * parts, index);
}

__device__ __forceinline__ float to_sum(float x) { return x; }
__device__ __forceinline__ double to_sum(double x) { return x; }
__device__ __forceinline__ float to_sum(Half x) { return to_float(x); }
__device__ __forceinline__ float to_sum(BFloat16 x) { return to_float(x); }

// Numbers that are loaded and stored together, with 16 bytes at a time at most.
template <class E, int V>
struct alignas(sizeof(E) * V < 16 ? sizeof(E) * V : 16) Pack {
  E lane[V];
};

template <int V, class E>
__device__ __forceinline__ Pack<E, V> load(const E* from) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Pack<E, V>*>(from);
#else
  Pack<E, V> pack;
  if (reinterpret_cast<uintptr_t>(from) % alignof(decltype(pack))) std::abort();  // an error on a GPU
  std::memcpy(&pack, from, sizeof pack);
  return pack;
#endif
}

template <int V, class E>
__device__ __forceinline__ void store(E* to, const Pack<E, V>& pack) {
#if defined(__CUDACC__)
  *reinterpret_cast<Pack<E, V>*>(to) = pack;
#else
  if (reinterpret_cast<uintptr_t>(to) % alignof(decltype(pack))) std::abort();
  std::memcpy(to, &pack, sizeof pack);
#endif
}

// Adds to memory that other threads add to as well.
template <int V, class A>
__device__ __forceinline__ void add_atomically(A* to, const Pack<A, V>& pack) {
#pragma unroll
  for (int v = 0; v < V; ++v) atomicAdd(to + v, pack.lane[v]);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <>
__device__ __forceinline__ void add_atomically(float* to, const Pack<float, 2>& pack) {
  atomicAdd(reinterpret_cast<float2*>(to), make_float2(pack.lane[0], pack.lane[1]));
}
template <>
__device__ __forceinline__ void add_atomically(float* to, const Pack<float, 4>& pack) {
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(pack.lane[0], pack.lane[1], pack.lane[2], pack.lane[3]));
}
#endif

// --------------------------------------------------------------------------------------------------- Where taps read

// What taps are found from, and what they read.
template <class T, class A>
struct Field {
  Geometry geometry;
  int64_t taps;
  const T* inputs;
  const A* offsets;
  const A* mask;
};

// Where one tap of one output pixel reads; see sampling.h.
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
  if (!inside) {  // all corners are zeros, and the fraction is 0, or NaN where the offset was
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

// A location's upper left corner and which corners are on the image, in one number.
template <class A>
__device__ __forceinline__ int64_t corner_code(const Geometry& g, const Location<A>& at) {
  return ((at.image * g.height + at.row) * g.width + at.column) * g.channels * 16 + at.on_image;
}

// The pixels of the four corners in V channels from `channel` on; 0 for a corner off the image.
template <int V, class T, class A>
__device__ __forceinline__ void read_corners(const Field<T, A>& field, int64_t code, int64_t channel,
                                             Pack<A, V> (&pixels)[4]) {
  const int64_t right = field.geometry.channels, down = right * field.geometry.width;
  const T* at = field.inputs + (code >> 4) + channel;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    Pack<T, V> loaded;
    const bool there = code >> corner & 1;
    if (there) loaded = load<V>(at + (corner & 1 ? right : 0) + (corner & 2 ? down : 0));
#pragma unroll
    for (int v = 0; v < V; ++v) pixels[corner].lane[v] = there ? to_sum(loaded.lane[v]) : A(0);
  }
}

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

// ------------------------------------------------------------------------------------------------------ Forward pass

template <class T, class A>
struct Samples {
  Field<T, A> field;
  int64_t first, pixels;  // output pixels
  int64_t tile;           // of them, that a block takes at a time
  const A* kernel;        // depthwise
  const A* bias;          // depthwise; null: none
  T* output;              // depthwise
  A* columns;             // else; it begins with pixel `first`
};

// Packs of channels that a thread takes through a tap: where channels do not fill wide packs, two, which share the
// reading of where the tap reads and with which weights.
KERAS_DAS_INLINE constexpr int packs_together(int width, int size) { return width <= 2 && width * size < 16 ? 2 : 1; }

// A depthwise convolution, or the columns of another one.
template <class T, class A, int V, bool kDepthwise>
__global__ void __launch_bounds__(kThreads) sample_pixels(Samples<T, A> a) {
  __shared__ Pack<A, 4> weights[kEntries];
  __shared__ int64_t codes[kEntries];
  const Geometry& g = a.field.geometry;
  const int64_t taps = a.field.taps, together = least<int64_t>(taps, kEntries);
  constexpr int kParts = packs_together(V, sizeof(T));
  const int64_t depth = quotient(g.channels, g.offset_groups), packs = depth / V;
  const int64_t threads = (packs + kParts - 1) / kParts;  // for a pixel
  const int64_t works = quotient(a.pixels + a.tile - 1, a.tile) * g.offset_groups;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t number = quotient(work, g.offset_groups), group = work - number * g.offset_groups;
    const int64_t first = a.first + number * a.tile;
    const int count = static_cast<int>(least(a.tile, a.first + a.pixels - first));
    const int64_t items = count * threads;
    for (int64_t base = 0; base < items; base += blockDim.x) {
      const int64_t item = base + threadIdx.x;
      const int64_t of_tile = item < items ? quotient(item, threads) : 0;
      const int64_t pixel = first + of_tile, thread = item - of_tile * threads;
      int64_t channels[kParts];
      bool active[kParts];
      Pack<A, V> sums[kParts] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        active[part] = item < items && thread + part * threads < packs;
        channels[part] = group * depth + (thread + part * threads) * V;
        if (kDepthwise && active[part] && a.bias) sums[part] = load<V>(a.bias + channels[part]);
      }
      for (int64_t tap = 0; tap < taps; tap += together) {
        const int n = static_cast<int>(least(together, taps - tap));
        if (base == 0 || taps > together) {  // else they are still there
          __syncthreads();
          for (int e = threadIdx.x; e < count * n; e += blockDim.x) {
            const Location<A> found = locate(a.field, first + e / n, group, tap + e % n);
            for (int corner = 0; corner < 4; ++corner) weights[e].lane[corner] = found.weights[corner];
            codes[e] = corner_code(g, found);
          }
          __syncthreads();
        }
        if (item >= items) continue;
        for (int t = 0; t < n; ++t) {
          const int e = static_cast<int>(of_tile) * n + t;
          const Pack<A, 4> weight = weights[e];
          const int64_t code = codes[e];
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            if (!active[part]) continue;
            Pack<A, V> pixels[4];
            read_corners(a.field, code, channels[part], pixels);
            const Pack<A, V> sample = interpolate(weight, pixels);
            if (kDepthwise) {
              const Pack<A, V> kernel = load<V>(a.kernel + (tap + t) * g.channels + channels[part]);
#pragma unroll
              for (int v = 0; v < V; ++v) sums[part].lane[v] += sample.lane[v] * kernel.lane[v];
            } else {
              store(a.columns + ((pixel - a.first) * taps + tap + t) * g.channels + channels[part], sample);
            }
          }
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!kDepthwise || !active[part]) continue;
        Pack<T, V> rounded;
#pragma unroll
        for (int v = 0; v < V; ++v) rounded.lane[v] = convert_to(sums[part].lane[v], static_cast<const T*>(nullptr));
        store(a.output + pixel * g.channels + channels[part], rounded);
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------- Backward pass

template <class T, class A>
struct Gradients {
  Field<T, A> field;
  int64_t first, pixels;   // output pixels
  int64_t ranges;          // parts that they are cut into: what a block takes
  int64_t skip, channels;  // of each offset group: those done by launches before, and those to do
  const A* kernel;         // depthwise
  const A* grad_output;    // depthwise
  A* columns;              // else; it begins with pixel `first`. Gradients of samples, which the samples replace
  A* grad_inputs;          // zero at first; null: not to be added to
  A* grad_offsets;
  A* grad_mask;      // null exactly if there is no mask
  A* kernel_shares;  // depthwise: (ranges, taps, channels), what each range adds to the kernel's gradient
};

// The sum over a warp of each of four numbers. Lanes 0, 8, 16 and 24 get them.
template <class A>
__device__ __forceinline__ A sum_over_warp(const A (&values)[4]) {
  constexpr unsigned kAll = 0xffffffffu;
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
  A even_sum = upper ? values[2] : values[0], odd_sum = upper ? values[3] : values[1];
  even_sum += __shfl_xor_sync(kAll, upper ? values[0] : values[2], 16);
  odd_sum += __shfl_xor_sync(kAll, upper ? values[1] : values[3], 16);
  A sum = odd ? odd_sum : even_sum;
  sum += __shfl_xor_sync(kAll, odd ? even_sum : odd_sum, 8);
  sum += __shfl_xor_sync(kAll, sum, 4);
  sum += __shfl_xor_sync(kAll, sum, 2);
  return sum + __shfl_xor_sync(kAll, sum, 1);
}

// The gradients of offsets and mask, and, as they come by, those of a depthwise kernel and of the inputs. A thread has
// the same channels all the way.
template <class T, class A, int V, bool kDepthwise>
__global__ void __launch_bounds__(kThreads) tap_gradients(Gradients<T, A> a) {
  __shared__ Pack<A, 4> weights[kGradientEntries];
  __shared__ A fractions_y[kGradientEntries], fractions_x[kGradientEntries], modulations[kGradientEntries];
  __shared__ int64_t codes[kGradientEntries];
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
#else
  unsigned char* dynamic_shared = cuda_on_host::dynamic_shared;
#endif
  A* products = reinterpret_cast<A*>(dynamic_shared);  // (entries, warps, corners): what the corners' pixels gain
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Geometry& g = a.field.geometry;
  const int64_t taps = a.field.taps, depth = quotient(g.channels, g.offset_groups);
  const int64_t tap_runs = quotient(taps + kTaps - 1, kTaps), works = a.ranges * g.offset_groups * tap_runs;
  constexpr int kParts = packs_together(V, sizeof(A));
  const auto in_chunk = [](int part) { return (static_cast<int64_t>(part) * blockDim.x + threadIdx.x) * V; };
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t groups_done = quotient(work, tap_runs), tap = (work - groups_done * tap_runs) * kTaps;
    const int64_t range = quotient(groups_done, g.offset_groups), group = groups_done - range * g.offset_groups;
    const int64_t start = group * depth + a.skip;
    const int n = static_cast<int>(least<int64_t>(kTaps, taps - tap)), tile = kGradientEntries / n;
    const int64_t stop = a.first + part_start(a.pixels, a.ranges, range + 1);
    Pack<A, V> shares[kTaps][kParts] = {};
    for (int64_t first = a.first + part_start(a.pixels, a.ranges, range); first < stop; first += tile) {
      const int count = static_cast<int>(least<int64_t>(tile, stop - first));
      // No barrier: of the tile before, the last part only has to do with entries that the same thread has here.
      for (int e = threadIdx.x; e < count * n; e += blockDim.x) {
        const Location<A> found = locate(a.field, first + e / n, group, tap + e % n);
        for (int corner = 0; corner < 4; ++corner) weights[e].lane[corner] = found.weights[corner];
        fractions_y[e] = found.y;
        fractions_x[e] = found.x;
        modulations[e] = found.modulation;
        codes[e] = corner_code(g, found);
      }
      __syncthreads();
      for (int p = 0; p < count; ++p) {
        const int64_t pixel = first + p;
        Pack<A, V> upstream[kParts] = {};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (!kDepthwise || in_chunk(part) >= a.channels) continue;
          upstream[part] = load<V>(a.grad_output + pixel * g.channels + start + in_chunk(part));
        }
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          if (t >= n) break;
          const int e = p * n + t;
          const Pack<A, 4> weight = weights[e];
          const int64_t code = codes[e];
          A gains[4] = {};
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            if (in_chunk(part) >= a.channels) continue;
            const int64_t channel = start + in_chunk(part);
            Pack<A, V> pixels[4], of_sample;
            read_corners(a.field, code, channel, pixels);
            const Pack<A, V> sample = interpolate(weight, pixels);
            if (kDepthwise) {
              of_sample = load<V>(a.kernel + (tap + t) * g.channels + channel);
#pragma unroll
              for (int v = 0; v < V; ++v) {
                of_sample.lane[v] *= upstream[part].lane[v];
                shares[t][part].lane[v] += upstream[part].lane[v] * sample.lane[v];
              }
            } else {
              A* column = a.columns + ((pixel - a.first) * taps + tap + t) * g.channels + channel;
              of_sample = load<V>(column);
              store(column, sample);
            }
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
              for (int v = 0; v < V; ++v) gains[corner] += pixels[corner].lane[v] * of_sample.lane[v];
              if (a.grad_inputs == nullptr || !(code >> corner & 1)) continue;
              A* to = a.grad_inputs + (code >> 4) + channel;
              to += (corner & 1 ? g.channels : 0) + (corner & 2 ? g.channels * g.width : 0);
              Pack<A, V> of_corner;
#pragma unroll
              for (int v = 0; v < V; ++v) of_corner.lane[v] = weight.lane[corner] * of_sample.lane[v];
              add_atomically(to, of_corner);
            }
          }
          const A sum = sum_over_warp(gains);
          if (lane % 8 == 0) products[(e * warps + warp) * 4 + lane / 8] = sum;
        }
      }
      __syncthreads();
      for (int e = threadIdx.x; e < count * n; e += blockDim.x) {
        A gains[4] = {};
        for (int w = 0; w < warps; ++w) {
          for (int corner = 0; corner < 4; ++corner) gains[corner] += products[(e * warps + w) * 4 + corner];
        }
        const int64_t entry = ((first + e / n) * g.offset_groups + group) * taps + tap + e % n;
        A grad_y, grad_x;
        offset_gradients(fractions_y[e], fractions_x[e], modulations[e], gains, &grad_y, &grad_x);
        a.grad_offsets[2 * entry] = grad_y + (a.skip ? a.grad_offsets[2 * entry] : A(0));
        a.grad_offsets[2 * entry + 1] = grad_x + (a.skip ? a.grad_offsets[2 * entry + 1] : A(0));
        if (a.grad_mask) {
          const A grad = mask_gradient(fractions_y[e], fractions_x[e], gains);
          a.grad_mask[entry] = grad + (a.skip ? a.grad_mask[entry] : A(0));
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!kDepthwise || t >= n || in_chunk(part) >= a.channels) continue;
        store(a.kernel_shares + (range * taps + tap + t) * g.channels + start + in_chunk(part), shares[t][part]);
      }
    }
  }
}

// ------------------------------------------------------------------------- The inputs' gradient, the same at every run

// Adds of floating-point numbers that race end in other bits at every run. Here each pixel's thread gathers instead:
// entries are sorted by the cell that they read, those of a cell by their number, and a pixel belongs to four cells.
// Lists are of an image and offset group. The cell at (row, column) is number (row + 1) * (width + 1) + column + 1.

template <class A>
struct Lists {
  Field<A, A> field;  // without inputs
  int64_t first, pixels;  // output pixels: whole images, or some of one image
  int64_t image, images;  // that those read
  int64_t cells;          // of a list
  int64_t room;           // entries of a list at most
  int* starts;            // (lists, cells): where in a list the entries of a cell start
  int* ends;              // and where they end; for a while, where the next one goes
  int* unsorted;          // (lists, room): the entries of one image and offset group count from 0
  int* sorted;
  A* weights;             // (lists, room, corners), in the order of `sorted`
};

enum class Step { kCount, kFill, kSort };

template <class A, Step kStep>
__global__ void __launch_bounds__(kThreads) sort_entries(Lists<A> a) {
  const Geometry& g = a.field.geometry;
  const int64_t taps = a.field.taps, out_pixels = g.out_height * g.out_width, all = a.pixels * g.offset_groups * taps;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < all; index += step) {
    const int64_t sets = quotient(index, taps), tap = index - sets * taps;
    const int64_t of_pixels = quotient(sets, g.offset_groups), group = sets - of_pixels * g.offset_groups;
    const int64_t pixel = a.first + of_pixels;
    const Location<A> found = locate(a.field, pixel, group, tap);
    if (!found.on_image) continue;
    const int64_t list = (found.image - a.image) * g.offset_groups + group;
    const int64_t cell = list * a.cells + static_cast<int64_t>(found.row + 1) * (g.width + 1) + found.column + 1;
    const int64_t first_of_image = found.image * out_pixels;
    const int64_t first = first_of_image > a.first ? first_of_image : a.first;
    const int entry = static_cast<int>((pixel - first) * taps + tap);
    if (kStep == Step::kCount) {
      atomicAdd(a.ends + cell, 1);
    } else if (kStep == Step::kFill) {
      a.unsorted[list * a.room + atomicAdd(a.ends + cell, 1)] = entry;
    } else {
      int64_t at = list * a.room + a.starts[cell];
      for (int64_t other = at, end = list * a.room + a.ends[cell], start = at; other < end; ++other) {
        at += a.unsorted[other] < entry && other >= start;
      }
      a.sorted[at] = entry;
      for (int corner = 0; corner < 4; ++corner) a.weights[4 * at + corner] = found.weights[corner];
    }
  }
}

// Turns the counts in `ends` into starts; `ends` holds them too then. A block for a list.
template <class A>
__global__ void __launch_bounds__(kThreads) start_lists(Lists<A> a) {
  __shared__ int sums[kThreads];
  for (int64_t list = blockIdx.x; list < a.images * a.field.geometry.offset_groups; list += gridDim.x) {
    int before = 0;
    for (int64_t base = list * a.cells; base < (list + 1) * a.cells; base += blockDim.x) {
      const int64_t cell = base + threadIdx.x;
      const int count = cell < (list + 1) * a.cells ? a.ends[cell] : 0;
      sums[threadIdx.x] = count;
      __syncthreads();
      for (int distance = 1; distance < static_cast<int>(blockDim.x); distance *= 2) {
        const int other = static_cast<int>(threadIdx.x) >= distance ? sums[threadIdx.x - distance] : 0;
        __syncthreads();
        sums[threadIdx.x] += other;
        __syncthreads();
      }
      if (cell < (list + 1) * a.cells) a.starts[cell] = a.ends[cell] = before + sums[threadIdx.x] - count;
      before += sums[blockDim.x - 1];
      __syncthreads();
    }
  }
}

template <class A>
struct Gathering {
  Lists<A> lists;
  const A* kernel;       // depthwise
  const A* grad_output;  // depthwise
  const A* columns;      // else: gradients of samples from pixel `lists.first` on
  A* grad_inputs;
  bool add;  // to what is there, from other pixels of the same image
};

template <class A, int V, bool kDepthwise>
__global__ void __launch_bounds__(kThreads) gather_gradients(Gathering<A> a) {
  const Lists<A>& lists = a.lists;
  const Geometry& g = lists.field.geometry;
  const int64_t taps = lists.field.taps, depth = quotient(g.channels, g.offset_groups), vectors = g.channels / V;
  const int64_t image_pixels = g.height * g.width, all = lists.images * image_pixels * vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < all; index += step) {
    const int64_t at = quotient(index, vectors), channel = (index - at * vectors) * V;
    const int64_t image = quotient(at, image_pixels), line = quotient(at, g.width);
    const int64_t row = line - image * g.height, column = at - line * g.width;
    const int64_t list = image * g.offset_groups + quotient(channel, depth);
    const int64_t first_of_image = (lists.image + image) * g.out_height * g.out_width;
    const int64_t first = first_of_image > lists.first ? first_of_image : lists.first;
    A* to = a.grad_inputs + lists.image * image_pixels * g.channels + at * g.channels + channel;
    Pack<A, V> sums = {};
    if (a.add) sums = load<V>(to);
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t cell = list * lists.cells + (row + 1 - corner / 2) * (g.width + 1) + column + 1 - corner % 2;
      for (int slot = lists.starts[cell]; slot < lists.ends[cell]; ++slot) {
        const int64_t entry = lists.sorted[list * lists.room + slot];
        const A weight = lists.weights[4 * (list * lists.room + slot) + corner];
        const int64_t of_image = quotient(entry, taps), tap = entry - of_image * taps, pixel = first + of_image;
        Pack<A, V> of_sample;
        if (kDepthwise) {
          of_sample = load<V>(a.kernel + tap * g.channels + channel);
          const Pack<A, V> upstream = load<V>(a.grad_output + pixel * g.channels + channel);
#pragma unroll
          for (int v = 0; v < V; ++v) of_sample.lane[v] *= upstream.lane[v];
        } else {
          of_sample = load<V>(a.columns + ((pixel - lists.first) * taps + tap) * g.channels + channel);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sums.lane[v] += weight * of_sample.lane[v];
      }
    }
    store(to, sums);
  }
}

// ---------------------------------------------------------------------------------------------------- Matrix products

// With the columns of some pixels, each group by itself:
enum class Product {
  kOutput,           // columns (pixels, rows) x kernel (rows, filters), and the bias
  kColumnGradients,  // grad_output (pixels, filters) x kernel^T
  kKernelGradients,  // columns^T x grad_output, cut along the pixels into parts
};

template <class T, class A>
struct Operands {
  int64_t pixels, taps, channels, filters, groups;
  A* columns;
  const A* kernel;
  const A* bias;         // null: none
  const A* grad_output;  // from the first of the pixels on, and so `output`
  T* output;
  A* grad_kernel;  // (parts, taps, channels / groups, filters)
  int64_t parts;
  bool add;  // to what `grad_kernel` has
};

constexpr int kTile = 64, kStep = 16;         // a block's part of the result, and of the sum, at a time
constexpr int kRow = kTile + 4;               // of a tile in shared memory: no two of 8 rows start in the same bank
constexpr int kSide = kTile / 16;             // a thread's part of the tile
static_assert(kThreads == 16 * 16, "a thread for each such part");

// A thread's share of adding up a tile of the result, by ordinary instructions: `kSide` rows and columns.
template <class A, Product kProduct, bool kOnTensorCores>
struct TileSums {
  // What a block multiplies at a time: (along the sum, rows) and (along the sum, columns).
  struct alignas(16) Shared {
    A left[kStep][kRow], right[kStep][kRow];
  };

  static __device__ __forceinline__ void put_left(Shared* tiles, int k, int row, A value) {
    tiles->left[k][row] = value;
  }
  static __device__ __forceinline__ void put_right(Shared* tiles, int k, int column, A value) {
    tiles->right[k][column] = value;
  }

  __device__ __forceinline__ void add(const Shared& tiles) {
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      const Pack<A, kSide> left = load<kSide>(&tiles.left[k][threadIdx.x / 16 * kSide]);
      const Pack<A, kSide> right = load<kSide>(&tiles.right[k][threadIdx.x % 16 * kSide]);
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) sums[i][j] += left.lane[i] * right.lane[j];
      }
    }
  }

  __device__ __forceinline__ void finish(Shared*) {}

  A sums[kSide][kSide] = {};
};

#if KERAS_DAS_TENSOR_CORES
// By tensor cores, for the 16-bit types. Their numbers here, TF32, have a float's range and 10 bits after the point:
// enough for either 16-bit type, so that a kernel's weights and the gradients of outputs go in as they are. A sample has
// become a float by interpolation. It goes in as two terms, the nearest such number and what is left, and so loses
// nothing that matters to a float.
template <Product kProduct>
struct TileSums<float, kProduct, true> {
  static constexpr int kTerms = kProduct == Product::kColumnGradients ? 1 : 2;
  static constexpr int kSquare = 16, kDeep = 8;  // of a tensor core's products
  static constexpr int kAcross = 2;              // squares side by side that a warp has
  static constexpr int kWarpsDown = kTile / kSquare;
  static_assert(kWarpsDown * kTile / (kAcross * kSquare) == kThreads / kWarp, "warps share a tile out");
  // As above, each number on the left in its terms; and in the end the result, of which threads have no known part.
  union alignas(32) Shared {
    struct {
      float left[kTerms][kStep][kRow], right[kStep][kRow];
    };
    float result[kTile][kRow];
  };
  using Products = wmma::fragment<wmma::accumulator, kSquare, kSquare, kDeep, float>;
  using Left = wmma::fragment<wmma::matrix_a, kSquare, kSquare, kDeep, wmma::precision::tf32, wmma::col_major>;
  using Right = wmma::fragment<wmma::matrix_b, kSquare, kSquare, kDeep, wmma::precision::tf32, wmma::row_major>;

  __device__ __forceinline__ TileSums() {
#pragma unroll
    for (int square = 0; square < kAcross; ++square) wmma::fill_fragment(totals[square], 0.f);
  }

  static __device__ __forceinline__ void put_left(Shared* tiles, int k, int row, float value) {
    const float nearest = wmma::__float_to_tf32(value);
    tiles->left[0][k][row] = nearest;
    // Nothing is left of an infinity, rather than a NaN.
    if (kTerms > 1) {
      tiles->left[kTerms - 1][k][row] = std::isinf(nearest) ? 0.f : wmma::__float_to_tf32(value - nearest);
    }
  }
  static __device__ __forceinline__ void put_right(Shared* tiles, int k, int column, float value) {
    tiles->right[k][column] = wmma::__float_to_tf32(value);
  }

  __device__ __forceinline__ void add(const Shared& tiles) {
    // Tensor cores cut off what does not fit into a sum. So sums there are short, and ordinary ones round.
    Products products[kAcross];
#pragma unroll
    for (int square = 0; square < kAcross; ++square) wmma::fill_fragment(products[square], 0.f);
#pragma unroll
    for (int k = 0; k < kStep; k += kDeep) {
      Right right[kAcross];
#pragma unroll
      for (int square = 0; square < kAcross; ++square) {
        wmma::load_matrix_sync(right[square], &tiles.right[k][first_column() + square * kSquare], kRow);
      }
#pragma unroll
      for (int term = kTerms - 1; term >= 0; --term) {
        Left left;
        wmma::load_matrix_sync(left, &tiles.left[term][k][first_row()], kRow);
#pragma unroll
        for (int square = 0; square < kAcross; ++square) {
          wmma::mma_sync(products[square], left, right[square], products[square]);
        }
      }
    }
#pragma unroll
    for (int square = 0; square < kAcross; ++square) {
#pragma unroll
      for (int i = 0; i < products[square].num_elements; ++i) totals[square].x[i] += products[square].x[i];
    }
  }

  // Hands out the result as the ordinary instructions have it.
  __device__ __forceinline__ void finish(Shared* tiles) {
    __syncthreads();  // others may still multiply
#pragma unroll
    for (int square = 0; square < kAcross; ++square) {
      float* to = &tiles->result[first_row()][first_column() + square * kSquare];
      wmma::store_matrix_sync(to, totals[square], kRow, wmma::mem_row_major);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const float* row = &tiles->result[threadIdx.x / 16 * kSide + i][threadIdx.x % 16 * kSide];
#pragma unroll
      for (int j = 0; j < kSide; ++j) sums[i][j] = row[j];
    }
  }

  static __device__ __forceinline__ int first_row() { return threadIdx.x / kWarp % kWarpsDown * kSquare; }
  static __device__ __forceinline__ int first_column() {
    return threadIdx.x / kWarp / kWarpsDown * kAcross * kSquare;
  }

  float sums[kSide][kSide];
  Products totals[kAcross];
};
#endif

template <class T, class A, Product kProduct>
__global__ void __launch_bounds__(kThreads, 2) multiply(Operands<T, A> a) {
  using Sums = TileSums<A, kProduct, sizeof(T) == 2 && KERAS_DAS_TENSOR_CORES>;
  __shared__ typename Sums::Shared tiles;
  constexpr bool kByPixel = kProduct != Product::kKernelGradients;
  const int64_t depth = a.channels / a.groups, filters = a.filters / a.groups, kernel_rows = a.taps * depth;
  const int64_t rows = kByPixel ? a.pixels : kernel_rows;
  const int64_t columns = kProduct == Product::kColumnGradients ? kernel_rows : filters;
  const int64_t length = kProduct == Product::kOutput            ? kernel_rows
                         : kProduct == Product::kColumnGradients ? filters
                                                                 : a.pixels;
  const int64_t row_tiles = quotient(rows + kTile - 1, kTile), column_tiles = quotient(columns + kTile - 1, kTile);
  // Which elements of the operands' tiles this thread loads: in the order in which memory has them.
  constexpr bool kLeftAlong = kByPixel, kRightAlong = kProduct == Product::kColumnGradients;
  constexpr int kLeftMore = kLeftAlong ? kThreads / kStep : kThreads / kTile;
  constexpr int kRightMore = kRightAlong ? kThreads / kStep : kThreads / kTile;
  constexpr int kLoads = kTile * kStep / kThreads;
  const int thread = threadIdx.x;
  const int left_k = kLeftAlong ? thread % kStep : thread / kTile;
  const int left_i = kLeftAlong ? thread / kStep : thread % kTile;
  const int right_k = kRightAlong ? thread % kStep : thread / kTile;
  const int right_j = kRightAlong ? thread / kStep : thread % kTile;
  for (int64_t work = blockIdx.x; work < row_tiles * column_tiles * a.groups * a.parts; work += gridDim.x) {
    const int64_t by_column = quotient(work, column_tiles), j0 = (work - by_column * column_tiles) * kTile;
    const int64_t by_row = quotient(by_column, row_tiles), i0 = (by_column - by_row * row_tiles) * kTile;
    const int64_t part = quotient(by_row, a.groups), group = by_row - part * a.groups;
    const int64_t begin = part_start(length, a.parts, part), end = part_start(length, a.parts, part + 1);
    const int64_t filter = group * filters;
    // Where row `q` of the group's kernel lies within a pixel's columns.
    const auto in_columns = [&](int64_t q) {
      const int64_t tap = quotient(q, depth);
      return tap * a.channels + group * depth + q - tap * depth;
    };
    A left_values[kLoads], right_values[kLoads];
    const auto fetch = [&](int64_t k0) {
      const int64_t along = kProduct == Product::kOutput ? in_columns(least(k0 + left_k, length - 1)) : 0;
      const int64_t across = kProduct == Product::kKernelGradients ? in_columns(least(i0 + left_i, rows - 1)) : 0;
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        const int64_t i = i0 + left_i + (kLeftAlong ? n * kLeftMore : 0);
        const int64_t k = k0 + left_k + (kLeftAlong ? 0 : n * kLeftMore);
        left_values[n] = 0;
        if (i >= rows || k >= end) continue;
        if (kProduct == Product::kOutput) left_values[n] = a.columns[i * a.taps * a.channels + along];
        if (kProduct == Product::kColumnGradients) left_values[n] = a.grad_output[i * a.filters + filter + k];
        if (kProduct == Product::kKernelGradients) left_values[n] = a.columns[k * a.taps * a.channels + across];
      }
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        const int64_t j = j0 + right_j + (kRightAlong ? n * kRightMore : 0);
        const int64_t k = k0 + right_k + (kRightAlong ? 0 : n * kRightMore);
        right_values[n] = 0;
        if (j >= columns || k >= end) continue;
        if (kProduct == Product::kOutput) right_values[n] = a.kernel[k * a.filters + filter + j];
        if (kProduct == Product::kColumnGradients) right_values[n] = a.kernel[j * a.filters + filter + k];
        if (kProduct == Product::kKernelGradients) right_values[n] = a.grad_output[k * a.filters + filter + j];
      }
    };
    Sums tile;
    fetch(begin);
    for (int64_t k0 = begin; k0 < end; k0 += kStep) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        Sums::put_left(&tiles, left_k + (kLeftAlong ? 0 : n * kLeftMore), left_i + (kLeftAlong ? n * kLeftMore : 0),
                       left_values[n]);
        Sums::put_right(&tiles, right_k + (kRightAlong ? 0 : n * kRightMore),
                        right_j + (kRightAlong ? n * kRightMore : 0), right_values[n]);
      }
      __syncthreads();
      if (k0 + kStep < end) fetch(k0 + kStep);  // under way while this step is multiplied
      tile.add(tiles);
    }
    tile.finish(&tiles);
#pragma unroll
    for (int of_j = 0; of_j < kSide; ++of_j) {
      const int64_t j = j0 + thread % 16 * kSide + of_j;
      if (j >= columns) break;
      const int64_t at = kProduct == Product::kColumnGradients ? in_columns(j) : filter + j;
      const A start = kProduct == Product::kOutput && a.bias ? a.bias[at] : A(0);
#pragma unroll
      for (int of_i = 0; of_i < kSide; ++of_i) {
        const int64_t i = i0 + thread / 16 * kSide + of_i;
        if (i >= rows) break;
        const A sum = start + tile.sums[of_i][of_j];
        if (kProduct == Product::kOutput) {
          a.output[i * a.filters + at] = convert_to(sum, static_cast<const T*>(nullptr));
        } else if (kProduct == Product::kColumnGradients) {
          a.columns[i * a.taps * a.channels + at] = sum;
        } else {
          A* to = a.grad_kernel + (part * kernel_rows + i) * a.filters + at;
          *to = sum + (a.add ? *to : A(0));
        }
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- Sums

template <class A>
struct Rows {
  const A* from;  // (rows, columns)
  int64_t rows, columns, parts;
  A* to;  // (parts, columns): the sums over parts of the rows
};

template <class A>
__global__ void __launch_bounds__(kThreads) add_rows(Rows<A> a) {
  constexpr int kDown = kThreads / kWarp;
  __shared__ A sums[kDown][kWarp];
  const int across = threadIdx.x % kWarp, down = threadIdx.x / kWarp;
  const int64_t strips = quotient(a.columns + kWarp - 1, kWarp);
  for (int64_t work = blockIdx.x; work < strips * a.parts; work += gridDim.x) {
    const int64_t part = quotient(work, strips), column = (work - part * strips) * kWarp + across;
    const int64_t end = part_start(a.rows, a.parts, part + 1);
    A sum = 0;
    for (int64_t row = part_start(a.rows, a.parts, part) + down; row < end && column < a.columns; row += kDown) {
      sum += a.from[row * a.columns + column];
    }
    __syncthreads();
    sums[down][across] = sum;
    __syncthreads();
    if (down == 0 && column < a.columns) {
      for (int other = 1; other < kDown; ++other) sum += sums[other][across];
      a.to[part * a.columns + column] = sum;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ Launches

// What a call may use. Its functions throw std::runtime_error with what went wrong.
class Device {
 public:
  explicit Device(const CudaCall& call) : call_(call) {}

  bool deterministic() const { return call_.deterministic; }
  int64_t workspace_bytes() const { return call_.workspace_bytes; }

  template <class E>
  E* allocate(int64_t count) const {
    void* memory = call_.allocate(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(E)));
    if (memory == nullptr) throw std::runtime_error("out of memory: there is none for the kernels' working copies");
    return static_cast<E*>(memory);
  }

  template <class E>
  void zero(E* memory, int64_t count) const {
    if (count == 0) return;
    const size_t bytes = static_cast<size_t>(count) * sizeof(E);
#if defined(__CUDACC__)
    check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(call_.stream)));
#else
    std::memset(static_cast<void*>(memory), 0, bytes);
#endif
  }

  // Starts a kernel that loops over `blocks` blocks' work.
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t blocks, const Arguments& arguments, int threads = kThreads,
              int64_t shared_bytes = 0) const {
    blocks = std::min(blocks, call_.most_blocks);
    if (blocks == 0) return;
#if defined(__CUDACC__)
    const auto stream = static_cast<cudaStream_t>(call_.stream);
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments);
    check(cudaGetLastError());
#else
    cuda_on_host::launch(blocks, threads, shared_bytes, [&] { kernel(arguments); });
#endif
  }

 private:
#if defined(__CUDACC__)
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
#endif

  const CudaCall& call_;
};

// How many numbers threads may load at once: as many as divide `channels`, make up at most 16 bytes of E, and leave
// enough threads busy, if all pointers are aligned to it.
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

bool is_depthwise(const Geometry& g) { return g.groups == g.channels && g.filters == g.channels; }

// Calls `f(first, pixels)` for runs of output pixels that need about `bytes` of working memory: whole images, or parts
// of one, so that an image's results do not depend on what else is in the batch.
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

// The sums of the columns of `rows` rows. Always in the same order.
template <class A>
void sum_rows(const Device& device, const A* from, int64_t rows, int64_t columns, A* to) {
  const int64_t strips = divide_up(columns, kWarp), fits = device.workspace_bytes() / (columns * int64_t{sizeof(A)});
  const int64_t parts = clamp(rows / 64, 1, std::max<int64_t>(1, std::min<int64_t>(256, fits)));
  A* sums = parts > 1 ? device.allocate<A>(parts * columns) : to;
  device.launch(add_rows<A>, strips * parts, Rows<A>{from, rows, columns, parts, sums});
  if (parts > 1) device.launch(add_rows<A>, strips, Rows<A>{sums, parts, columns, 1, to});
}

template <class T, class A>
Field<T, A> make_field(const Geometry& g, const void* inputs, const void* offsets, const void* mask) {
  return {g, g.taps(), static_cast<const T*>(inputs), static_cast<const A*>(offsets), static_cast<const A*>(mask)};
}

template <bool kDepthwise, class T, class A>
void take_samples(const Device& device, Samples<T, A> samples) {
  const Geometry& g = samples.field.geometry;
  const int64_t most = std::max<int64_t>(kEntries / samples.field.taps, 1);
  samples.tile = clamp(samples.pixels * g.offset_groups / kBlocks, 1, most);
  const int width = pack_width<T>(g.channels / g.offset_groups, {samples.field.inputs, samples.kernel, samples.bias,
                                                                 samples.output, samples.columns});
  device.launch(sampling_kernel<T, A, kDepthwise>(width), divide_up(samples.pixels, samples.tile) * g.offset_groups,
                samples);
}

template <Product kProduct, class T, class A>
void take_product(const Device& device, const Operands<T, A>& a) {
  const int64_t filters = divide_up(a.filters / a.groups, kTile);
  const int64_t kernel_rows = divide_up(a.taps * (a.channels / a.groups), kTile), pixels = divide_up(a.pixels, kTile);
  const int64_t tiles = kProduct == Product::kOutput            ? pixels * filters
                        : kProduct == Product::kColumnGradients ? pixels * kernel_rows
                                                                : kernel_rows * filters;
  device.launch(multiply<T, A, kProduct>, tiles * a.groups * a.parts, a);
}

template <class T, class A>
Operands<T, A> make_operands(const Geometry& g, const void* kernel) {
  Operands<T, A> a{};
  a.taps = g.taps(), a.channels = g.channels, a.filters = g.filters, a.groups = g.groups, a.parts = 1;
  a.kernel = static_cast<const A*>(kernel);
  return a;
}

// Working memory for the columns of as many pixels as `for_each_run` takes at a time.
template <class A>
struct Columns {
  Columns(const Device& device, const Geometry& g) : bytes_per_pixel(g.taps() * g.channels * int64_t{sizeof(A)}) {
    const int64_t pixels = clamp(device.workspace_bytes() / bytes_per_pixel, 1, g.batch * g.out_pixels());
    memory = device.allocate<A>(pixels * g.taps() * g.channels);
  }
  int64_t bytes_per_pixel;
  A* memory;
};

template <class T, class A>
void dense_forward(const Device& device, const Geometry& g, const ForwardBuffers& buffers) {
  const Columns<A> columns(device, g);
  Samples<T, A> samples{};
  samples.field = make_field<T, A>(g, buffers.inputs, buffers.offsets, buffers.mask);
  samples.columns = columns.memory;
  Operands<T, A> operands = make_operands<T, A>(g, buffers.kernel);
  operands.columns = columns.memory;
  operands.bias = static_cast<const A*>(buffers.bias);
  for_each_run(g, columns.bytes_per_pixel, device.workspace_bytes(), [&](int64_t first, int64_t pixels) {
    samples.first = first;
    samples.pixels = operands.pixels = pixels;
    operands.output = static_cast<T*>(buffers.output) + first * g.filters;
    take_samples<false>(device, samples);
    take_product<Product::kOutput>(device, operands);
  });
}

template <class T>
void forward_of(const Device& device, const Geometry& g, const ForwardBuffers& buffers) {
  using A = typename SumType<T>::type;
  if (output_elements(g) == 0) return;
  if (!is_depthwise(g)) return dense_forward<T, A>(device, g, buffers);
  Samples<T, A> samples{};
  samples.field = make_field<T, A>(g, buffers.inputs, buffers.offsets, buffers.mask);
  samples.pixels = g.batch * g.out_pixels();
  samples.kernel = static_cast<const A*>(buffers.kernel);
  samples.bias = static_cast<const A*>(buffers.bias);
  samples.output = static_cast<T*>(buffers.output);
  take_samples<true>(device, samples);
}

// The gradients of offsets and mask, and more; see `tap_gradients`. As many channels as a block has threads for at a
// time.
template <bool kDepthwise, class T, class A>
void take_gradients(const Device& device, Gradients<T, A> a) {
  const Geometry& g = a.field.geometry;
  const int64_t depth = g.channels / g.offset_groups, tap_runs = divide_up(a.field.taps, kTaps);
  const int width = pack_width<A>(depth, {a.field.inputs, a.kernel, a.grad_output, a.columns, a.grad_inputs});
  const int parts = packs_together(width, sizeof(A));
  const int64_t together = int64_t{kThreads} * width * parts;
  for (a.skip = 0; a.skip < depth; a.skip += together) {
    a.channels = std::min(together, depth - a.skip);
    const int warps = static_cast<int>(divide_up(a.channels, width * parts * kWarp));
    device.launch(gradient_kernel<T, A, kDepthwise>(width), a.ranges * g.offset_groups * tap_runs, a, warps * kWarp,
                  int64_t{kGradientEntries} * warps * 4 * int64_t{sizeof(A)});
  }
}

// Parts of the pixels that blocks take, given that there may be at most `most`.
int64_t count_ranges(const Geometry& g, int64_t pixels, int64_t most) {
  const int64_t others = g.offset_groups * divide_up(g.taps(), kTaps);
  return clamp(std::min(kBlocks / others, pixels / kLeastPixels), 1, std::max<int64_t>(most, 1));
}

// Working memory for lists, and what of it is the same for each run of pixels.
template <class A>
class Gatherer {
 public:
  Gatherer(const Device& device, const Geometry& g, const BackwardBuffers& buffers) : device_(device) {
    if (g.taps() > INT_MAX) throw std::runtime_error("there are more than 2^31 taps, too many to be sorted");
    lists_.field = make_field<A, A>(g, nullptr, buffers.offsets, buffers.mask);
    lists_.cells = (g.height + 1) * (g.width + 1);
    const int64_t of_entries = (2 * int64_t{sizeof(int)} + 4 * int64_t{sizeof(A)}) * g.offset_groups * g.taps();
    const int64_t of_cells = 2 * int64_t{sizeof(int)} * g.offset_groups * lists_.cells;
    bytes_per_pixel_ = of_entries + divide_up(of_cells, g.out_pixels());
  }

  int64_t bytes_per_pixel() const { return bytes_per_pixel_; }

  // Sets the inputs' gradient of whole images, or adds to it what comes from some of an image's pixels.
  template <bool kDepthwise>
  void gather(int64_t first, int64_t pixels, Gathering<A> gathering) {
    const Geometry& g = lists_.field.geometry;
    const int64_t taps = lists_.field.taps, entries = pixels * g.offset_groups * taps;
    lists_.first = first, lists_.pixels = pixels;
    lists_.image = first / g.out_pixels();
    lists_.images = divide_up(pixels, g.out_pixels());
    lists_.room = std::min(pixels, g.out_pixels()) * taps;
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
Gradients<T, A> make_gradients(const Geometry& g, const BackwardBuffers& buffers, bool scatter) {
  Gradients<T, A> a{};
  a.field = make_field<T, A>(g, buffers.inputs, buffers.offsets, buffers.mask);
  a.grad_inputs = scatter ? static_cast<A*>(buffers.grad_inputs) : nullptr;
  a.grad_offsets = static_cast<A*>(buffers.grad_offsets);
  a.grad_mask = static_cast<A*>(buffers.grad_mask);
  return a;
}

template <class T, class A>
void depthwise_backward(const Device& device, const Geometry& g, const BackwardBuffers& buffers) {
  Gradients<T, A> a = make_gradients<T, A>(g, buffers, !device.deterministic());
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
  Gradients<T, A> a = make_gradients<T, A>(g, buffers, !device.deterministic());
  a.columns = columns.memory;
  Gatherer<A> gatherer(device, g, buffers);
  Gathering<A> gathering{};
  gathering.columns = columns.memory;
  gathering.grad_inputs = static_cast<A*>(buffers.grad_inputs);
  Operands<T, A> operands = make_operands<T, A>(g, buffers.kernel);
  operands.columns = columns.memory;
  const int64_t rows = g.taps() * (g.channels / g.groups), weights = rows * g.filters;
  const int64_t tiles = divide_up(rows, kTile) * divide_up(g.filters / g.groups, kTile) * g.groups;
  const int64_t fits = device.workspace_bytes() / (weights * int64_t{sizeof(A)});
  const int64_t parts = clamp(kBlocks / 2 / tiles, 1, clamp(fits, 1, 64));
  A* grad_kernel = static_cast<A*>(buffers.grad_kernel);
  operands.grad_kernel = parts > 1 ? device.allocate<A>(parts * weights) : grad_kernel;
  const int64_t per_pixel = std::max(columns.bytes_per_pixel, device.deterministic() ? gatherer.bytes_per_pixel() : 0);
  for_each_run(g, per_pixel, device.workspace_bytes(), [&](int64_t first, int64_t pixels) {
    a.first = first;
    a.pixels = operands.pixels = pixels;
    a.ranges = count_ranges(g, pixels, kBlocks);
    operands.grad_output = static_cast<const A*>(buffers.grad_output) + first * g.filters;
    operands.parts = 1;
    take_product<Product::kColumnGradients>(device, operands);
    if (device.deterministic()) gatherer.template gather<false>(first, pixels, gathering);
    take_gradients<false>(device, a);
    operands.parts = parts;
    operands.add = first > 0;
    take_product<Product::kKernelGradients>(device, operands);
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
    return;  // no pixels, and no offsets for them
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
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

#if defined(__CUDACC__)
// Why no kernel can run on the thread's device, or "": the driver may be too old for this CUDA runtime, or the GPU of
// an architecture that nothing was compiled for.
const char* find_problem() {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, add_rows<float>);
  cudaGetLastError();  // forget it: launches ask for the last error
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
#endif

}  // namespace
}  // namespace cuda

std::string cuda_forward(DType dtype, const Geometry& geometry, const ForwardBuffers& buffers, const CudaCall& call) {
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

std::string cuda_backward(DType dtype, const Geometry& geometry, const BackwardBuffers& buffers, const CudaCall& call) {
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
