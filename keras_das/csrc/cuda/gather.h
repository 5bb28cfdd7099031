// The gradient of the inputs with the same bits at every run.
//
// Atomic additions of floating-point numbers have no fixed order, so their results differ from run to run.
// Here, each pixel's thread gathers its gradient instead. Entries are sorted by the cell that they read, and
// the entries of a cell by their number. A pixel belongs to four cells. There is one list for each image and
// offset group. The cell at (row, column) has the number (row + 1) * (width + 1) + column + 1.
#ifndef KERAS_DAS_CSRC_CUDA_GATHER_H_
#define KERAS_DAS_CSRC_CUDA_GATHER_H_

#include <cstdint>

#include "common.h"
#include "cuda/locate.h"
#include "cuda/pack.h"
#include "cuda/platform.h"

namespace keras_das {
namespace cuda {
namespace {

template <class A>
struct Lists {
  Field<A, A> field;      // without inputs
  int64_t first, pixels;  // output pixels: whole images, or part of one image
  int64_t image, images;  // of these pixels
  int64_t cells;          // of a list
  int64_t capacity;       // of a list, in entries
  int* starts;            // (lists, cells): the first entry of each cell
  int* ends;              // (lists, cells): the entry after the last one; while filling, the next free place
  int* unsorted;          // (lists, capacity): entries, numbered from 0 in each list
  int* sorted;
  A* weights;  // (lists, capacity, corners), in the order of `sorted`
};

// The steps of sorting: count the entries of each cell, write them in any order, sort those of each cell.
enum class Step { kCount, kFill, kSort };

template <class A, Step kStep>
__global__ void __launch_bounds__(kThreads) sort_entries(Lists<A> a) {
  const Geometry& g = a.field.geometry;
  const int64_t taps = a.field.taps, out_pixels = g.out_height * g.out_width,
                all = a.pixels * g.offset_groups * taps;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < all;
       index += step) {
    const int64_t sets = quotient(index, taps), tap = index - sets * taps;
    const int64_t of_pixels = quotient(sets, g.offset_groups), group = sets - of_pixels * g.offset_groups;
    const int64_t pixel = a.first + of_pixels;
    const Location<A> found = locate(a.field, pixel, group, tap);
    if (!found.on_image) continue;
    const int64_t list = (found.image - a.image) * g.offset_groups + group;
    const int64_t cell =
        list * a.cells + static_cast<int64_t>(found.row + 1) * (g.width + 1) + found.column + 1;
    const int64_t first_of_image = found.image * out_pixels;
    const int64_t first = first_of_image > a.first ? first_of_image : a.first;
    const int entry = static_cast<int>((pixel - first) * taps + tap);
    if (kStep == Step::kCount) {
      atomicAdd(a.ends + cell, 1);
    } else if (kStep == Step::kFill) {
      a.unsorted[list * a.capacity + atomicAdd(a.ends + cell, 1)] = entry;
    } else {
      int64_t at = list * a.capacity + a.starts[cell];
      for (int64_t other = at, end = list * a.capacity + a.ends[cell], start = at; other < end; ++other) {
        at += a.unsorted[other] < entry && other >= start;
      }
      a.sorted[at] = entry;
      for (int corner = 0; corner < 4; ++corner) a.weights[4 * at + corner] = found.weights[corner];
    }
  }
}

// Computes the starts from the counts in `ends`, and sets `ends` to the starts. One block processes one list.
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
  const A* columns;      // not depthwise: gradients of samples, beginning with pixel `lists.first`
  A* grad_inputs;
  bool add;  // to `grad_inputs`, which has the contributions of other pixels of the same image
};

// Computes the gradient of the inputs from sorted lists.
template <class A, int V, bool kDepthwise>
__global__ void __launch_bounds__(kThreads) gather_gradients(Gathering<A> a) {
  const Lists<A>& lists = a.lists;
  const Geometry& g = lists.field.geometry;
  const int64_t taps = lists.field.taps, depth = quotient(g.channels, g.offset_groups),
                vectors = g.channels / V;
  const int64_t image_pixels = g.height * g.width, all = lists.images * image_pixels * vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < all;
       index += step) {
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
      const int64_t cell =
          list * lists.cells + (row + 1 - corner / 2) * (g.width + 1) + column + 1 - corner % 2;
      for (int slot = lists.starts[cell]; slot < lists.ends[cell]; ++slot) {
        const int64_t entry = lists.sorted[list * lists.capacity + slot];
        const A weight = lists.weights[4 * (list * lists.capacity + slot) + corner];
        const int64_t of_image = quotient(entry, taps), tap = entry - of_image * taps,
                      pixel = first + of_image;
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

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_GATHER_H_
