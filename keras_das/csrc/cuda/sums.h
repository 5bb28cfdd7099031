// Sums over rows.
#ifndef KERAS_DAS_CSRC_CUDA_SUMS_H_
#define KERAS_DAS_CSRC_CUDA_SUMS_H_

#include <cstdint>

#include "common.h"
#include "cuda/platform.h"

namespace keras_das {
namespace cuda {
namespace {

template <class A>
struct Rows {
  const A* from;  // (rows, columns)
  int64_t rows, columns, parts;
  A* to;  // (parts, columns): the sums over each part of the rows
};

// Adds up rows.
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
    for (int64_t row = part_start(a.rows, a.parts, part) + down; row < end && column < a.columns;
         row += kDown) {
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

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_SUMS_H_
