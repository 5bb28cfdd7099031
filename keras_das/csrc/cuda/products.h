// The matrix products of convolutions that are not depthwise, with the columns of some output pixels. Each
// group is multiplied separately.
//
// Each kind of product is a type. matmul.h uses these members: the sizes of the result, `rows` and `columns`,
// and the number of terms of each sum, `length`; the addresses of the elements of the left matrix at (row, k)
// and of the right one at (k, column); and the stores of the results.
#ifndef KERAS_DAS_CSRC_CUDA_PRODUCTS_H_
#define KERAS_DAS_CSRC_CUDA_PRODUCTS_H_

#include <cstdint>

#include "common.h"
#include "cuda/platform.h"
#include "sampling.h"

namespace keras_das {
namespace cuda {
namespace {

template <class T, class A>
struct Operands {
  int64_t pixels, taps, channels, filters, groups;
  A* columns;  // (pixels, taps, channels): samples, or their gradients
  const A* kernel;
  const A* bias;         // null: none
  const A* grad_output;  // begins with the first of the pixels, as does `output`
  T* output;
  A* grad_kernel;  // (parts, taps, channels / groups, filters)
  int64_t parts;   // of the sums
  bool add;        // to `grad_kernel`
};

// The operands of one group.
template <class T, class A>
struct Group {
  KERAS_DAS_INLINE explicit Group(const Operands<T, A>& a)
      : depth(a.channels / a.groups), filters(a.filters / a.groups), kernel_rows(a.taps * depth) {}

  // The position of a row of the group's kernel in the columns of a pixel.
  __device__ __forceinline__ int64_t in_columns(const Operands<T, A>& a, int64_t row) const {
    if (a.groups == 1) return row;
    const int64_t tap = quotient(row, depth);
    return tap * a.channels + index * depth + row - tap * depth;
  }

  int64_t depth, filters, kernel_rows;
  int64_t index = 0, first_filter = 0;
};

// The members that most products have in common.
template <class T, class A>
struct Product {
  using G = Group<T, A>;
  using O = Operands<T, A>;
  static KERAS_DAS_INLINE int64_t rows(const O& a, const G&) { return a.pixels; }
  static KERAS_DAS_INLINE int64_t columns(const O&, const G& g) { return g.filters; }
  // Positions in memory that depend only on the row, for `left`, or only on the column, for `put`.
  static __device__ __forceinline__ int64_t place_of_row(const O&, const G&, int64_t) { return 0; }
  static __device__ __forceinline__ int64_t place_of_column(const O&, const G& g, int64_t column) {
    return g.first_filter + column;
  }
  // The number to which a sum is added.
  static __device__ __forceinline__ A start(const O&, int64_t) { return 0; }
};

// output = columns (pixels, rows) x kernel (rows, filters), plus the bias.
template <class T, class A>
struct OutputProduct : Product<T, A> {
  using G = Group<T, A>;
  using O = Operands<T, A>;
  // For each operand: whether neighbors in memory are neighbors in a sum. Otherwise they are in the result.
  static constexpr bool kLeftAlong = true, kRightAlong = false;
  static constexpr bool kLeftIsSample = true;  // samples are floats for every `T`

  static KERAS_DAS_INLINE int64_t length(const O&, const G& g) { return g.kernel_rows; }
  // The distance between rows of the left operand, or between terms of the sum if rows are neighbors.
  static __device__ __forceinline__ int64_t left_stride(const O& a) { return a.taps * a.channels; }
  static __device__ __forceinline__ const A* left(const O& a, const G& g, int64_t row, int64_t, int64_t k) {
    return a.columns + row * left_stride(a) + g.in_columns(a, min_of(k, g.kernel_rows - 1));
  }
  static __device__ __forceinline__ const A* right(const O& a, const G& g, int64_t k, int64_t column) {
    return a.kernel + k * a.filters + g.first_filter + column;
  }
  static __device__ __forceinline__ A start(const O& a, int64_t place) {
    return a.bias ? a.bias[place] : A(0);
  }
  static __device__ __forceinline__ void put(const O& a, const G&, int64_t, int64_t row, int64_t place,
                                             A sum) {
    a.output[row * a.filters + place] = convert_to(sum, static_cast<const T*>(nullptr));
  }
};

// columns = grad_output (pixels, filters) x transposed kernel (filters, rows): the gradients of the samples.
template <class T, class A>
struct ColumnGradients : Product<T, A> {
  using G = Group<T, A>;
  using O = Operands<T, A>;
  static constexpr bool kLeftAlong = true, kRightAlong = true;
  static constexpr bool kLeftIsSample = false;

  static KERAS_DAS_INLINE int64_t columns(const O&, const G& g) { return g.kernel_rows; }
  static KERAS_DAS_INLINE int64_t length(const O&, const G& g) { return g.filters; }
  static __device__ __forceinline__ int64_t left_stride(const O& a) { return a.filters; }
  static __device__ __forceinline__ const A* left(const O& a, const G& g, int64_t row, int64_t, int64_t k) {
    return a.grad_output + row * a.filters + g.first_filter + k;
  }
  static __device__ __forceinline__ const A* right(const O& a, const G& g, int64_t k, int64_t column) {
    return a.kernel + column * a.filters + g.first_filter + k;
  }
  static __device__ __forceinline__ int64_t place_of_column(const O& a, const G& g, int64_t column) {
    return g.in_columns(a, column);
  }
  static __device__ __forceinline__ void put(const O& a, const G&, int64_t, int64_t row, int64_t place,
                                             A sum) {
    a.columns[row * (a.taps * a.channels) + place] = sum;
  }
};

// grad_kernel = transposed columns (rows, pixels) x grad_output (pixels, filters), in parts of the pixels.
template <class T, class A>
struct KernelGradients : Product<T, A> {
  using G = Group<T, A>;
  using O = Operands<T, A>;
  static constexpr bool kLeftAlong = false, kRightAlong = false;
  static constexpr bool kLeftIsSample = true;

  static KERAS_DAS_INLINE int64_t rows(const O&, const G& g) { return g.kernel_rows; }
  static KERAS_DAS_INLINE int64_t length(const O& a, const G&) { return a.pixels; }
  static __device__ __forceinline__ int64_t left_stride(const O& a) { return a.taps * a.channels; }
  static __device__ __forceinline__ int64_t place_of_row(const O& a, const G& g, int64_t row) {
    return g.in_columns(a, min_of(row, g.kernel_rows - 1));
  }
  static __device__ __forceinline__ const A* left(const O& a, const G&, int64_t, int64_t place, int64_t k) {
    return a.columns + k * left_stride(a) + place;
  }
  static __device__ __forceinline__ const A* right(const O& a, const G& g, int64_t k, int64_t column) {
    return a.grad_output + k * a.filters + g.first_filter + column;
  }
  static __device__ __forceinline__ void put(const O& a, const G& g, int64_t part, int64_t row, int64_t place,
                                             A sum) {
    A* to = a.grad_kernel + (part * g.kernel_rows + row) * a.filters + place;
    *to = sum + (a.add ? *to : A(0));
  }
};

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_PRODUCTS_H_
