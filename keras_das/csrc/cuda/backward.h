// Gradients of offsets and mask, and, in the same pass, of the inputs and of a depthwise kernel.
#ifndef KERAS_DAS_CSRC_CUDA_BACKWARD_H_
#define KERAS_DAS_CSRC_CUDA_BACKWARD_H_

#include <cstdint>

#include "common.h"
#include "cuda/locate.h"
#include "cuda/pack.h"
#include "cuda/platform.h"
#include "sampling.h"

namespace keras_das {
namespace cuda {
namespace {

constexpr int kGradientEntries = 144;  // in the shared memory of a block
constexpr int kTaps = 9;               // whose kernel gradients a thread adds up in registers

template <class T, class A>
struct Gradients {
  Field<T, A> field;
  int64_t first, pixels;   // output pixels
  int64_t ranges;          // the number of parts of the pixels; a block processes one
  int64_t skip, channels;  // of each offset group: done by earlier launches, and by this one
  const A* kernel;         // depthwise
  const A* grad_output;    // depthwise
  A* columns;      // not depthwise; begins with pixel `first`. Gradients of samples, replaced by the samples
  A* grad_inputs;  // zeros before the first launch; null: not computed
  A* grad_offsets;
  A* grad_mask;      // null if and only if there is no mask
  A* kernel_shares;  // depthwise: (ranges, taps, channels), the kernel's gradient over each range
};

// The sums over a warp of four numbers. Lanes 0, 8, 16 and 24 return them.
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

// Computes the gradients. A thread processes the same channels of all pixels.
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
  A* products = reinterpret_cast<A*>(dynamic_shared);  // (entries, warps, corners); see `offset_gradients`
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Geometry& g = a.field.geometry;
  const int64_t taps = a.field.taps, depth = quotient(g.channels, g.offset_groups);
  const int64_t tap_runs = quotient(taps + kTaps - 1, kTaps), works = a.ranges * g.offset_groups * tap_runs;
  const int64_t in_chunk = static_cast<int64_t>(threadIdx.x) * V;
  const bool active = in_chunk < a.channels;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t groups_done = quotient(work, tap_runs), tap = (work - groups_done * tap_runs) * kTaps;
    const int64_t range = quotient(groups_done, g.offset_groups),
                  group = groups_done - range * g.offset_groups;
    const int64_t channel = group * depth + a.skip + in_chunk;
    const int n = static_cast<int>(min_of(kTaps, taps - tap)), tile = kGradientEntries / n;
    const int64_t stop = a.first + part_start(a.pixels, a.ranges, range + 1);
    Pack<A, V> shares[kTaps] = {};
    for (int64_t first = a.first + part_start(a.pixels, a.ranges, range); first < stop; first += tile) {
      const int count = static_cast<int>(min_of(tile, stop - first));
      // No barrier is required: the last loop over the previous tile assigns the same entries to this thread.
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

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_BACKWARD_H_
