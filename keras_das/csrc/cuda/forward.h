// Samples of the inputs: a depthwise convolution, or the left matrix of the product of another convolution.
//
// Consecutive threads process consecutive channels. A block locates the taps of some pixels, stores the
// results in shared memory, and then processes all channels.
#ifndef KERAS_DAS_CSRC_CUDA_FORWARD_H_
#define KERAS_DAS_CSRC_CUDA_FORWARD_H_

#include <cstdint>

#include "common.h"
#include "cuda/locate.h"
#include "cuda/pack.h"
#include "cuda/platform.h"

namespace keras_das {
namespace cuda {
namespace {

constexpr int kEntries = 256;  // in the shared memory of a block

template <class T, class A>
struct Samples {
  Field<T, A> field;
  int64_t first, pixels;  // output pixels
  int64_t tile;           // the number of them that a block processes at a time
  const A* kernel;        // depthwise
  const A* bias;          // depthwise; null: none
  T* output;              // depthwise
  A* columns;             // not depthwise; begins with pixel `first`
};

// Computes a depthwise convolution, or the columns of another convolution.
template <class T, class A, int V, bool kDepthwise>
__global__ void __launch_bounds__(kThreads) sample_pixels(Samples<T, A> a) {
  __shared__ Pack<A, 4> weights[kEntries];
  __shared__ Corners corners[kEntries];
  const Geometry& g = a.field.geometry;
  const int64_t taps = a.field.taps, together = min_of(taps, kEntries);
  // The packs of channels that a thread processes. If the channels do not fill wide packs, these are two
  // packs, which share the reads of positions and weights.
  constexpr int kParts = V <= 2 && V * sizeof(T) < 16 ? 2 : 1;
  const int64_t depth = quotient(g.channels, g.offset_groups), packs = depth / V;
  const int64_t threads = (packs + kParts - 1) / kParts;  // of a pixel
  const int64_t works = quotient(a.pixels + a.tile - 1, a.tile) * g.offset_groups;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t number = quotient(work, g.offset_groups), group = work - number * g.offset_groups;
    const int64_t first = a.first + number * a.tile;
    const int count = static_cast<int>(min_of(a.tile, a.first + a.pixels - first));
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
        active[part] = pack < packs;  // inactive threads compute the last pack and do not store it
        channels[part] = group * depth + min_of(pack, packs - 1) * V;
        if (kDepthwise && a.bias) sums[part] = load<V>(a.bias + channels[part]);
      }
      for (int64_t tap = 0; tap < taps; tap += together) {
        const int n = static_cast<int>(min_of(together, taps - tap));
        if (base == 0 || taps > together) {  // otherwise shared memory has them already
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
      if constexpr (kDepthwise) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (!active[part] || item >= items) continue;
          Pack<T, V> rounded;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            rounded.lane[v] = convert_to(sums[part].lane[v], static_cast<const T*>(nullptr));
          }
          store(a.output + pixel * g.channels + channels[part], rounded);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_FORWARD_H_
