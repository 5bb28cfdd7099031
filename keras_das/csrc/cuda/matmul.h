// Matrix products of the kinds in products.h.
#ifndef KERAS_DAS_CSRC_CUDA_MATMUL_H_
#define KERAS_DAS_CSRC_CUDA_MATMUL_H_

#include <cstdint>

#include "common.h"
#include "cuda/platform.h"
#include "cuda/products.h"
#include "cuda/tiles.h"

namespace keras_das {
namespace cuda {
namespace {

template <class T, class A, class P>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 1 : 2) multiply(Operands<T, A> a) {
  using Sums = TileSums<T, A, P, sizeof(A) == 4 && KERAS_DAS_TENSOR_CORES>;
  __shared__ typename Sums::Shared tiles[2];  // one is filled while the other is multiplied
  constexpr int kTall = kTileRows<A>, kWide = kTileColumns<A>;
  Group<T, A> group(a);
  const int64_t rows = P::rows(a, group), columns = P::columns(a, group);
  const int64_t length = P::length(a, group);
  const int64_t row_tiles = quotient(rows + kTall - 1, kTall),
                column_tiles = quotient(columns + kWide - 1, kWide);
  // The elements of the operands' tiles that this thread loads, in the order of memory.
  constexpr bool kLeftAlong = P::kLeftAlong, kRightAlong = P::kRightAlong;
  constexpr int kLeftMore = kLeftAlong ? kThreads / kStep : kThreads / kTall;
  constexpr int kRightMore = kRightAlong ? kThreads / kStep : kThreads / kWide;
  constexpr int kLeftLoads = kTall * kStep / kThreads, kRightLoads = kWide * kStep / kThreads;
  const int thread = threadIdx.x;
  const int left_k = kLeftAlong ? thread % kStep : thread / kTall;
  const int left_i = kLeftAlong ? thread / kStep : thread % kTall;
  const int right_k = kRightAlong ? thread % kStep : thread / kWide;
  const int right_j = kRightAlong ? thread / kStep : thread % kWide;
  const int64_t left_step = kLeftMore * P::left_stride(a);
  const int64_t right_step = kRightMore * a.filters;
  for (int64_t work = blockIdx.x; work < row_tiles * column_tiles * a.groups * a.parts; work += gridDim.x) {
    const int64_t by_column = quotient(work, column_tiles), j0 = (work - by_column * column_tiles) * kWide;
    const int64_t by_row = quotient(by_column, row_tiles), i0 = (by_column - by_row * row_tiles) * kTall;
    const int64_t part = quotient(by_row, a.groups);
    group.index = by_row - part * a.groups;
    group.first_filter = group.index * group.filters;
    const int64_t begin = part_start(length, a.parts, part), end = part_start(length, a.parts, part + 1);
    const int64_t i = i0 + left_i, j = j0 + right_j;
    const int64_t place = P::place_of_row(a, group, i);
    A left_values[kLeftLoads], right_values[kRightLoads];
    const auto fetch = [&](int64_t k0) {
      const int64_t left = k0 + left_k, right = k0 + right_k;
      const A* left_from = P::left(a, group, i, place, left);
      const A* right_from = P::right(a, group, right, j);
      // The number of elements that exist, along the index that changes from one load to the next.
      const int64_t of_left = i < rows && left < end ? (kLeftAlong ? rows - i : end - left) : 0;
      const int64_t of_right = j < columns && right < end ? (kRightAlong ? columns - j : end - right) : 0;
      const int lefts = static_cast<int>(min_of(of_left, kLeftLoads * kLeftMore));
      const int rights = static_cast<int>(min_of(of_right, kRightLoads * kRightMore));
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
        const int k = left_k + (kLeftAlong ? 0 : n * kLeftMore),
                  i = left_i + (kLeftAlong ? n * kLeftMore : 0);
        infinite |= Sums::put_left(&tiles[turn], k, i, left_values[n]);
      }
#pragma unroll
      for (int n = 0; n < kRightLoads; ++n) {
        const int k = right_k + (kRightAlong ? 0 : n * kRightMore),
                  j = right_j + (kRightAlong ? n * kRightMore : 0);
        infinite |= Sums::put_right(&tiles[turn], k, j, right_values[n]);
      }
      infinite = __syncthreads_or(infinite);
      if (k0 + kStep < end) fetch(k0 + kStep);  // while this step is multiplied
      tile.add(tiles[turn], infinite);
    }
    __syncthreads();  // other threads may still read what the next tile overwrites
#pragma unroll
    for (int of_j = 0; of_j < Sums::kColumns; ++of_j) {
      const int64_t j = j0 + Sums::column(of_j);
      if (j >= columns) continue;
      const int64_t place = P::place_of_column(a, group, j);
      const A start = P::start(a, place);
#pragma unroll
      for (int of_i = 0; of_i < Sums::kRows; ++of_i) {
        const int64_t i = i0 + Sums::row(of_i);
        if (i < rows) P::put(a, group, part, i, place, start + tile.at(of_i, of_j));
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_MATMUL_H_
