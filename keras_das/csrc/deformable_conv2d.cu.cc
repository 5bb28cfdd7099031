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

// Tensor cores take TF32 from compute capability 8.0 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define KERAS_DAS_TENSOR_CORES 0
#else
#define KERAS_DAS_TENSOR_CORES 1
#endif

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
#endif

// A TF32 number: the nearest with `half` of its last digit, the next towards 0 with 0. Of finite numbers only.
__device__ __forceinline__ float to_tf32(float value, uint32_t half) {
  return from_bits((bits_of(value) + half) & ~uint32_t{0x1fff});
}

#if defined(__CUDACC__) && KERAS_DAS_TENSOR_CORES
// Adds a warp's product of TF32 numbers, 16 rows by 8 columns over 8 products each, to `sums`. With g = lane / 4 and
// t = lane % 4 a lane has, of the left, (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); of the right, (t, g), (t + 4, g);
// of the sums, (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const float (&left)[4], const float (&right)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(bits_of(left[0])), "r"(bits_of(left[1])), "r"(bits_of(left[2])), "r"(bits_of(left[3])),
        "r"(bits_of(right[0])), "r"(bits_of(right[1])));
#endif
}
#endif

constexpr int kWarp = 32;
constexpr int kThreads = 256;        // of a block
constexpr int kEntries = 256;        // that a block of the forward pass keeps
constexpr int kGradientEntries = 144;  // that a block of the backward pass keeps, with what their gradients need
constexpr int kTaps = 9;             // whose kernel gradients a thread adds up in registers
constexpr int64_t kBlocks = 4096;    // enough to fill a GPU some times over; also where sums are cut into parts
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
  int64_t taps, line;  // `line`: a line of the image, in elements
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

// Where a location's corners lie in memory. Those off the image have the place of one on it, or that of the first pixel:
// so all four can be loaded without asking.
struct Corners {
  int64_t first;  // of the upper left one, in elements
  int flags;      // bits 0 to 3: which are on the image; 4 and 5: whether the others lie to the right, and below
};

template <class A>
__device__ __forceinline__ Corners find_corners(const Geometry& g, const Location<A>& at) {
  if (!at.on_image) return {0, 0};
  const int row = at.row < 0 ? 0 : at.row, column = at.column < 0 ? 0 : at.column;
  const bool right = at.column >= 0 && at.column + 1 < g.width, below = at.row >= 0 && at.row + 1 < g.height;
  return {((at.image * g.height + row) * g.width + column) * g.channels, at.on_image | right << 4 | below << 5};
}

// How far from the upper left corner the others lie: to the right, and below.
struct Steps {
  int64_t right, down;
  __device__ __forceinline__ int64_t to(int corner) const { return (corner & 1 ? right : 0) + (corner & 2 ? down : 0); }
};

template <class T, class A>
__device__ __forceinline__ Steps corner_steps(const Field<T, A>& field, int flags) {
  return {flags & 16 ? field.geometry.channels : 0, flags & 32 ? field.line : 0};
}

// The pixels of the four corners, the first of which is `at`, in V channels; 0 for a corner off the image.
template <int V, class T, class A>
__device__ __forceinline__ void read_corners(const T* at, const Steps& steps, int flags, Pack<A, V> (&pixels)[4]) {
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

// A depthwise convolution, or the columns of another one.
template <class T, class A, int V, bool kDepthwise>
__global__ void __launch_bounds__(kThreads) sample_pixels(Samples<T, A> a) {
  __shared__ Pack<A, 4> weights[kEntries];
  __shared__ Corners corners[kEntries];
  const Geometry& g = a.field.geometry;
  const int64_t taps = a.field.taps, together = least<int64_t>(taps, kEntries);
  // Packs of channels that a thread takes through a tap: where channels do not fill wide packs, two, which share the
  // reading of where the tap reads and with which weights.
  constexpr int kParts = V <= 2 && V * sizeof(T) < 16 ? 2 : 1;
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
        const int64_t pack = thread + part * threads;
        active[part] = pack < packs;  // one that is not has the last pack, and keeps the result to itself
        channels[part] = group * depth + least(pack, packs - 1) * V;
        if (kDepthwise && a.bias) sums[part] = load<V>(a.bias + channels[part]);
      }
      for (int64_t tap = 0; tap < taps; tap += together) {
        const int n = static_cast<int>(least(together, taps - tap));
        if (base == 0 || taps > together) {  // else they are still there
          __syncthreads();
          for (int e = threadIdx.x; e < count * n; e += blockDim.x) {
            const Location<A> found = locate(a.field, first + e / n, group, tap + e % n);
            for (int corner = 0; corner < 4; ++corner) weights[e].lane[corner] = found.weights[corner];
            corners[e] = find_corners(g, found);
          }
          __syncthreads();
        }
        if (item >= items) continue;
        const A* kernel = a.kernel + tap * g.channels;
        A* column = a.columns + ((pixel - a.first) * taps + tap) * g.channels;
        for (int t = 0; t < n; ++t) {
          const int e = static_cast<int>(of_tile) * n + t;
          const Pack<A, 4> weight = weights[e];
          const Corners at = corners[e];
          const Steps steps = corner_steps(a.field, at.flags);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            Pack<A, V> pixels[4];
            read_corners(a.field.inputs + at.first + channels[part], steps, at.flags, pixels);
            const Pack<A, V> sample = interpolate(weight, pixels);
            if (kDepthwise) {
              const Pack<A, V> of_tap = load<V>(kernel + channels[part]);
#pragma unroll
              for (int v = 0; v < V; ++v) sums[part].lane[v] += sample.lane[v] * of_tap.lane[v];
            } else if (active[part]) {
              store(column + channels[part], sample);
            }
          }
          kernel += g.channels;
          column += g.channels;
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!kDepthwise || !active[part] || item >= items) continue;
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
__global__ void __launch_bounds__(kThreads, 2) tap_gradients(Gradients<T, A> a) {
  __shared__ Pack<A, 4> weights[kGradientEntries];
  __shared__ A fractions_y[kGradientEntries], fractions_x[kGradientEntries], modulations[kGradientEntries];
  __shared__ Corners corners[kGradientEntries];
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
  const int64_t in_chunk = static_cast<int64_t>(threadIdx.x) * V;
  const bool active = in_chunk < a.channels;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t groups_done = quotient(work, tap_runs), tap = (work - groups_done * tap_runs) * kTaps;
    const int64_t range = quotient(groups_done, g.offset_groups), group = groups_done - range * g.offset_groups;
    const int64_t channel = group * depth + a.skip + in_chunk;
    const int n = static_cast<int>(least<int64_t>(kTaps, taps - tap)), tile = kGradientEntries / n;
    const int64_t stop = a.first + part_start(a.pixels, a.ranges, range + 1);
    Pack<A, V> shares[kTaps] = {};
    for (int64_t first = a.first + part_start(a.pixels, a.ranges, range); first < stop; first += tile) {
      const int count = static_cast<int>(least<int64_t>(tile, stop - first));
      // No barrier: of the tile before, the last part only has to do with entries that the same thread has here.
      for (int e = threadIdx.x; e < count * n; e += blockDim.x) {
        const Location<A> found = locate(a.field, first + e / n, group, tap + e % n);
        for (int corner = 0; corner < 4; ++corner) weights[e].lane[corner] = found.weights[corner];
        fractions_y[e] = found.y;
        fractions_x[e] = found.x;
        modulations[e] = found.modulation;
        corners[e] = find_corners(g, found);
      }
      __syncthreads();
      for (int p = 0; p < count; ++p) {
        const int64_t pixel = first + p;
        const A* kernel = a.kernel + tap * g.channels + channel;
        A* column = a.columns + ((pixel - a.first) * taps + tap) * g.channels + channel;
        Pack<A, V> upstream = {};
        if (kDepthwise && active) upstream = load<V>(a.grad_output + pixel * g.channels + channel);
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          if (t >= n) break;
          const int e = p * n + t;
          A gains[4] = {};
          if (active) {
            const Pack<A, 4> weight = weights[e];
            const Corners at = corners[e];
            const Steps steps = corner_steps(a.field, at.flags);
            Pack<A, V> pixels[4], of_sample;
            read_corners(a.field.inputs + at.first + channel, steps, at.flags, pixels);
            const Pack<A, V> sample = interpolate(weight, pixels);
            if (kDepthwise) {
              of_sample = load<V>(kernel);
#pragma unroll
              for (int v = 0; v < V; ++v) {
                of_sample.lane[v] *= upstream.lane[v];
                shares[t].lane[v] += upstream.lane[v] * sample.lane[v];
              }
            } else {
              of_sample = load<V>(column);
              store(column, sample);
            }
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
              for (int v = 0; v < V; ++v) gains[corner] += pixels[corner].lane[v] * of_sample.lane[v];
              if (a.grad_inputs == nullptr || !(at.flags >> corner & 1)) continue;
              Pack<A, V> of_corner;
#pragma unroll
              for (int v = 0; v < V; ++v) of_corner.lane[v] = weight.lane[corner] * of_sample.lane[v];
              add_atomically(a.grad_inputs + at.first + channel + steps.to(corner), of_corner);
            }
          }
          kernel += g.channels;
          column += g.channels;
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
      if (!kDepthwise || t >= n || !active) continue;
      store(a.kernel_shares + (range * taps + tap + t) * g.channels + channel, shares[t]);
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

// How a block goes about a product: by tiles of the result, for which it takes in `kStep` terms of the sums at a time.
constexpr int kStep = 16;
template <class A>
constexpr int kTileRows = sizeof(A) == 4 ? 128 : 64;
template <class A>
constexpr int kTileColumns = sizeof(A) == 4 ? 128 : 64;

// A thread's share of a tile, by ordinary instructions: rows and columns that lie together.
template <class T, class A, Product kProduct, bool kOnTensorCores>
struct TileSums {
  static constexpr int kRows = kTileRows<A> / 16, kColumns = kTileColumns<A> / 16;  // a thread's
  static_assert(kThreads == 16 * 16, "a thread for each such part");
  // What is multiplied in one step: (along the sum, rows) and (along the sum, columns).
  struct alignas(16) Shared {
    A left[kStep][kTileRows<A> + 4], right[kStep][kTileColumns<A> + 4];
  };

  static __device__ __forceinline__ bool put_left(Shared* tiles, int k, int row, A value) {
    tiles->left[k][row] = value;
    return false;
  }
  static __device__ __forceinline__ bool put_right(Shared* tiles, int k, int column, A value) {
    tiles->right[k][column] = value;
    return false;
  }

  __device__ __forceinline__ void add(const Shared& tiles, bool) {
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      const Pack<A, kRows> left = load<kRows>(&tiles.left[k][row(0)]);
      const Pack<A, kColumns> right = load<kColumns>(&tiles.right[k][column(0)]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i][j] += left.lane[i] * right.lane[j];
      }
    }
  }

  // The sum at (i, j) belongs to this row and column of the tile.
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 16 * kRows + i; }
  static __device__ __forceinline__ int column(int j) { return threadIdx.x % 16 * kColumns + j; }
  __device__ __forceinline__ A& at(int i, int j) { return sums[i][j]; }

  A sums[kRows][kColumns] = {};
};

#if KERAS_DAS_TENSOR_CORES
// By tensor cores. Their numbers here, TF32, have a float's range and 10 bits after the point: enough for either 16-bit
// type, so that a kernel's weights and the gradients of outputs of these go in as they are. A float goes in as two terms,
// the nearest such number and what is left, and so loses nothing that matters to a float: the product of the two rests,
// which is left out, is below its last digit.
template <class T, Product kProduct>
struct TileSums<T, float, kProduct, true> {
  static constexpr bool kFloats = sizeof(T) == 4;
  static constexpr bool kSplitsLeft = kFloats || kProduct != Product::kColumnGradients;  // samples are floats always
  static constexpr bool kSplitsRight = kFloats;
  static constexpr bool kSplits = kSplitsLeft || kSplitsRight;
  // A warp has `kDown` by `kAcross` of the rectangles that tensor cores multiply at a time, of 16 rows and 8 columns.
  static constexpr int kDeep = 8, kWarpsAcross = 4, kWarpsDown = kThreads / kWarp / kWarpsAcross;
  static constexpr int kDown = kTileRows<float> / kWarpsDown / 16, kAcross = kTileColumns<float> / kWarpsAcross / 8;
  static constexpr int kRows = 2 * kDown, kColumns = 2 * kAcross;  // a thread's
  // An operand that memory has along the sum stays so. Either way the 32 numbers that a warp reads are in 32 banks.
  template <int kSize, bool kAlong>
  struct Operand {
    static constexpr int kRow = kAlong ? kStep + 4 : kSize + 8;
    float numbers[kAlong ? kSize * kRow : kStep * kRow];
    static __device__ __forceinline__ int index(int k, int i) { return kAlong ? i * kRow + k : k * kRow + i; }
  };
  struct alignas(16) Shared {
    Operand<kTileRows<float>, kProduct != Product::kKernelGradients> left;
    Operand<kTileColumns<float>, kProduct == Product::kColumnGradients> right;
  };

  static __device__ __forceinline__ bool put_left(Shared* tiles, int k, int row, float value) {
    return put(&tiles->left, k, row, value);
  }
  static __device__ __forceinline__ bool put_right(Shared* tiles, int k, int column, float value) {
    return put(&tiles->right, k, column, value);
  }

  // Tensor cores cut off what does not fit into a sum. So sums there are short, and ordinary ones round.
  __device__ __forceinline__ void add(const Shared& tiles, bool infinite) {
    if (kSplits && infinite) return add_ordinarily(tiles);
    constexpr int kDeeps = kStep / kDeep;
    const int lane = threadIdx.x % kWarp, across = lane / 4, along = lane % 4;
    float right[kDeeps][kAcross][2], right_rest[kDeeps][kAcross][2];
#pragma unroll
    for (int deep = 0; deep < kDeeps; ++deep) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = deep * kDeep + along + 4 * e;
          const float value = tiles.right.numbers[tiles.right.index(k, first_column() + 8 * j + across)];
          split<kSplitsRight>(value, &right[deep][j][e], &right_rest[deep][j][e]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      float left[kDeeps][4], left_rest[kDeeps][4];
#pragma unroll
      for (int deep = 0; deep < kDeeps; ++deep) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = deep * kDeep + along + e / 2 * 4, row = first_row() + 16 * i + across + e % 2 * 8;
          split<kSplitsLeft>(tiles.left.numbers[tiles.left.index(k, row)], &left[deep][e], &left_rest[deep][e]);
        }
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        float products[4] = {};
#pragma unroll
        for (int deep = 0; deep < kDeeps; ++deep) {
          if (kSplitsRight) multiply_tf32(products, left[deep], right_rest[deep][j]);
          if (kSplitsLeft) multiply_tf32(products, left_rest[deep], right[deep][j]);
        }
#pragma unroll
        for (int deep = 0; deep < kDeeps; ++deep) multiply_tf32(products, left[deep], right[deep][j]);
#pragma unroll
        for (int e = 0; e < 4; ++e) totals[i][j][e] += products[e];
      }
    }
  }

  static __device__ __forceinline__ int row(int i) {
    return first_row() + i / 2 * 16 + i % 2 * 8 + threadIdx.x % kWarp / 4;
  }
  static __device__ __forceinline__ int column(int j) {
    return first_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
  }
  __device__ __forceinline__ float& at(int i, int j) { return totals[i / 2][j / 2][i % 2 * 2 + j % 2]; }

 private:
  static __device__ __forceinline__ int first_row() { return threadIdx.x / kWarp / kWarpsAcross * kDown * 16; }
  static __device__ __forceinline__ int first_column() {
    return threadIdx.x / kWarp % kWarpsAcross * kAcross * 8;
  }

  // Returns whether the number cannot be split: it is infinite, or would be so.
  template <class Operand>
  static __device__ __forceinline__ bool put(Operand* operand, int k, int i, float value) {
    operand->numbers[operand->index(k, i)] = value;
    return kSplits && !(std::fabs(value) < kLargest);
  }

  template <bool kSplit>
  static __device__ __forceinline__ void split(float value, float* nearest, float* rest) {
    *nearest = kSplit ? to_tf32(value, 1 << 12) : value;
    *rest = kSplit ? to_tf32(value - *nearest, 0) : 0.f;
  }

  __device__ void add_ordinarily(const Shared& tiles) {
#pragma unroll 1
    for (int k = 0; k < kStep; ++k) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float right = tiles.right.numbers[tiles.right.index(k, column(j))];
#pragma unroll
        for (int i = 0; i < kRows; ++i) at(i, j) += tiles.left.numbers[tiles.left.index(k, row(i))] * right;
      }
    }
  }

  static constexpr float kLargest = 3.4e38f;  // below what TF32 rounds to infinity

  float totals[kDown][kAcross][4] = {};
};
#endif

template <class T, class A, Product kProduct>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 1 : 2) multiply(Operands<T, A> a) {
  using Sums = TileSums<T, A, kProduct, sizeof(A) == 4 && KERAS_DAS_TENSOR_CORES>;
  __shared__ typename Sums::Shared tiles[2];  // one is filled while the other is multiplied
  constexpr bool kByPixel = kProduct != Product::kKernelGradients;
  constexpr int kTall = kTileRows<A>, kWide = kTileColumns<A>;
  const int64_t depth = a.channels / a.groups, filters = a.filters / a.groups, kernel_rows = a.taps * depth;
  const int64_t line = a.taps * a.channels;  // a pixel's columns
  const int64_t rows = kByPixel ? a.pixels : kernel_rows;
  const int64_t columns = kProduct == Product::kColumnGradients ? kernel_rows : filters;
  const int64_t length = kProduct == Product::kOutput            ? kernel_rows
                         : kProduct == Product::kColumnGradients ? filters
                                                                 : a.pixels;
  const int64_t row_tiles = quotient(rows + kTall - 1, kTall), column_tiles = quotient(columns + kWide - 1, kWide);
  // Which elements of the operands' tiles this thread loads: in the order in which memory has them.
  constexpr bool kLeftAlong = kByPixel, kRightAlong = kProduct == Product::kColumnGradients;
  constexpr int kLeftMore = kLeftAlong ? kThreads / kStep : kThreads / kTall;
  constexpr int kRightMore = kRightAlong ? kThreads / kStep : kThreads / kWide;
  constexpr int kLeftLoads = kTall * kStep / kThreads, kRightLoads = kWide * kStep / kThreads;
  const int thread = threadIdx.x;
  const int left_k = kLeftAlong ? thread % kStep : thread / kTall;
  const int left_i = kLeftAlong ? thread / kStep : thread % kTall;
  const int right_k = kRightAlong ? thread % kStep : thread / kWide;
  const int right_j = kRightAlong ? thread / kStep : thread % kWide;
  const int64_t left_step = kLeftMore * (kProduct == Product::kColumnGradients ? a.filters : line);
  const int64_t right_step = kRightMore * a.filters;
  for (int64_t work = blockIdx.x; work < row_tiles * column_tiles * a.groups * a.parts; work += gridDim.x) {
    const int64_t by_column = quotient(work, column_tiles), j0 = (work - by_column * column_tiles) * kWide;
    const int64_t by_row = quotient(by_column, row_tiles), i0 = (by_column - by_row * row_tiles) * kTall;
    const int64_t part = quotient(by_row, a.groups), group = by_row - part * a.groups;
    const int64_t begin = part_start(length, a.parts, part), end = part_start(length, a.parts, part + 1);
    const int64_t filter = group * filters;
    // Where row `q` of the group's kernel lies within a pixel's columns.
    const auto in_columns = [&](int64_t q) {
      if (a.groups == 1) return q;
      const int64_t tap = quotient(q, depth);
      return tap * a.channels + group * depth + q - tap * depth;
    };
    const int64_t i = i0 + left_i, j = j0 + right_j;
    const int64_t across = kProduct == Product::kKernelGradients ? in_columns(least(i, rows - 1)) : 0;
    A left_values[kLeftLoads], right_values[kRightLoads];
    const auto fetch = [&](int64_t k0) {
      const int64_t left = k0 + left_k, right = k0 + right_k;
      const A* left_from = kProduct == Product::kOutput ? a.columns + i * line + in_columns(least(left, length - 1))
                           : kProduct == Product::kColumnGradients ? a.grad_output + i * a.filters + filter + left
                                                                   : a.columns + left * line + across;
      const A* right_from = kProduct == Product::kOutput            ? a.kernel + right * a.filters + filter + j
                            : kProduct == Product::kColumnGradients ? a.kernel + j * a.filters + filter + right
                                                                    : a.grad_output + right * a.filters + filter + j;
      // How far there is something to load, counted along what changes from one load to the next.
      const int64_t of_left = i < rows && left < end ? (kLeftAlong ? rows - i : end - left) : 0;
      const int64_t of_right = j < columns && right < end ? (kRightAlong ? columns - j : end - right) : 0;
      const int lefts = static_cast<int>(least<int64_t>(of_left, kLeftLoads * kLeftMore));
      const int rights = static_cast<int>(least<int64_t>(of_right, kRightLoads * kRightMore));
#pragma unroll
      for (int n = 0; n < kLeftLoads; ++n, left_from += left_step) {
        left_values[n] = n * kLeftMore < lefts ? *left_from : A(0);
      }
#pragma unroll
      for (int n = 0; n < kRightLoads; ++n, right_from += right_step) {
        right_values[n] = n * kRightMore < rights ? *right_from : A(0);
      }
    };
    Sums tile;
    fetch(begin);
    int turn = 0;
    for (int64_t k0 = begin; k0 < end; k0 += kStep, turn ^= 1) {
      bool infinite = false;
#pragma unroll
      for (int n = 0; n < kLeftLoads; ++n) {
        const int k = left_k + (kLeftAlong ? 0 : n * kLeftMore), i = left_i + (kLeftAlong ? n * kLeftMore : 0);
        infinite |= Sums::put_left(&tiles[turn], k, i, left_values[n]);
      }
#pragma unroll
      for (int n = 0; n < kRightLoads; ++n) {
        const int k = right_k + (kRightAlong ? 0 : n * kRightMore), j = right_j + (kRightAlong ? n * kRightMore : 0);
        infinite |= Sums::put_right(&tiles[turn], k, j, right_values[n]);
      }
      infinite = __syncthreads_or(infinite);
      if (k0 + kStep < end) fetch(k0 + kStep);  // under way while this step is multiplied
      tile.add(tiles[turn], infinite);
    }
    __syncthreads();  // others may still multiply what the next tile overwrites
#pragma unroll
    for (int of_j = 0; of_j < Sums::kColumns; ++of_j) {
      const int64_t j = j0 + Sums::column(of_j);
      if (j >= columns) continue;
      const int64_t at = kProduct == Product::kColumnGradients ? in_columns(j) : filter + j;
      const A start = kProduct == Product::kOutput && a.bias ? a.bias[at] : A(0);
#pragma unroll
      for (int of_i = 0; of_i < Sums::kRows; ++of_i) {
        const int64_t i = i0 + Sums::row(of_i);
        if (i >= rows) continue;
        const A sum = start + tile.at(of_i, of_j);
        if (kProduct == Product::kOutput) {
          a.output[i * a.filters + at] = convert_to(sum, static_cast<const T*>(nullptr));
        } else if (kProduct == Product::kColumnGradients) {
          a.columns[i * line + at] = sum;
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
  return {g, g.taps(), g.width * g.channels, static_cast<const T*>(inputs), static_cast<const A*>(offsets), static_cast<const A*>(mask)};
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

template <class A>
int64_t count_tiles(int64_t rows, int64_t columns) {
  return divide_up(rows, kTileRows<A>) * divide_up(columns, kTileColumns<A>);
}

template <Product kProduct, class T, class A>
void take_product(const Device& device, const Operands<T, A>& a) {
  const int64_t filters = a.filters / a.groups, kernel_rows = a.taps * (a.channels / a.groups);
  const int64_t tiles = kProduct == Product::kOutput            ? count_tiles<A>(a.pixels, filters)
                        : kProduct == Product::kColumnGradients ? count_tiles<A>(a.pixels, kernel_rows)
                                                                : count_tiles<A>(kernel_rows, filters);
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
  const int64_t together = int64_t{kThreads} * width;
  for (a.skip = 0; a.skip < depth; a.skip += together) {
    a.channels = std::min(together, depth - a.skip);
    const int warps = static_cast<int>(divide_up(a.channels, width * kWarp));
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
  const int64_t tiles = count_tiles<A>(rows, g.filters / g.groups) * g.groups;
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
