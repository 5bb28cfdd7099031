// Matrix products of tiles in row-major order.
#ifndef KERAS_DAS_CSRC_CPU_MATMUL_H_
#define KERAS_DAS_CSRC_CPU_MATMUL_H_

#include <cstdint>

#include "common.h"
#include "cpu/simd.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

// The columns of the widest left matrix, and the distance between its rows. The distance is not a power of
// two, so that rows do not map to the same sets of a cache.
constexpr int64_t kTileColumns = 512;
constexpr int64_t kTileStride = kTileColumns + 16;

// Copies `columns` columns of a matrix with rows of `stride` elements into rows of `width` elements, which
// are whole vectors. Pads with zeros.
template <class A>
KERAS_DAS_INLINE void pack_rows(const A* from, int64_t stride, int64_t rows, int64_t columns, int64_t width,
                                A* panel) {
  constexpr int L = Simd<A>::kLanes;
  const int64_t whole = columns / L * L;
  for (int64_t k = 0; k < rows; ++k, from += stride, panel += width) {
    for (int64_t j = 0; j < whole; j += L) store(panel + j, load(from + j));
    for (int64_t j = whole; j < width; j += L) {
      store(panel + j, load_first(from + j, static_cast<int>(j == whole ? columns - whole : 0)));
    }
  }
}

// Copies the transpose of `columns` rows, `rows` elements of each after the first `skip`, into rows of
// `width` elements. Pads with zeros.
template <class A>
inline void pack_transposed(const A* const* from, int64_t skip, int64_t rows, int64_t columns, int64_t width,
                            A* panel) {
  constexpr int64_t kBlock = 16;  // rows of the panel filled together, so that each cache line is read once
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

// Computes `kRows` rows by `NV` vectors of columns of left x panel in registers, and adds them to `output` if
// `add` is set, otherwise to `bias`. The rows of `left`, or its columns if it is transposed, are kTileStride
// apart. `panel` is packed. Writes only `rows` rows and, of the last vector, `last` columns.
template <int NV, bool kTransposed, class A>
inline void product_tile(int64_t depth, const A* left, const A* panel, const A* bias, A* output,
                         int64_t stride, int rows, int last, bool add) {
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

// Multiplies left (rows x depth) by right (depth x columns) into `output`; see `product_tile`. `pack(first,
// count, width, panel)` packs columns of `right` into `panel`, which has a capacity of depth x 2 vectors.
template <bool kTransposed, class A, class Pack>
void multiply(int64_t rows, int64_t depth, int64_t columns, const A* left, const Pack& pack, A* panel,
              const A* bias, A* output, int64_t stride, bool add) {
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
        product_tile<2, kTransposed>(depth, from, panel, start, to, stride, left_rows,
                                     static_cast<int>(count - L), add);
      } else {
        product_tile<1, kTransposed>(depth, from, panel, start, to, stride, left_rows,
                                     static_cast<int>(count), add);
      }
    }
  }
}

}  // namespace
}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CPU_MATMUL_H_
