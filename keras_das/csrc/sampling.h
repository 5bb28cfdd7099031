// The arithmetic of one sample, and 16-bit floats. The kernels for CPUs use it on vectors, those for CUDA on
// single numbers. See common.h for the namespace.
#ifndef KERAS_DAS_CSRC_SAMPLING_H_
#define KERAS_DAS_CSRC_SAMPLING_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace keras_das {
namespace KERAS_DAS_ISA {

// ----- 16-bit floats

// The bits of a 16-bit float. `Half` is IEEE binary16, `BFloat16` the upper half of a float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of sums of values of type `T`.
template <class T>
struct SumType {
  using type = float;
};
template <>
struct SumType<double> {
  using type = double;
};

KERAS_DAS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

KERAS_DAS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

KERAS_DAS_INLINE float to_float(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

KERAS_DAS_INLINE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  const bool finite = magnitude < 0x7c00u;
  if (!finite) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Subnormal numbers are multiples of 2^-24. Frameworks switch off subnormal arithmetic, so this uses none.
  // The exponents of other numbers differ by 112.
  const uint32_t bits = magnitude < 0x400u ? float_to_bits(static_cast<float>(magnitude) * 0x1p-24f)
                                           : (magnitude << 13) + 0x38000000u;
  return bits_to_float(sign | bits);
#endif
}

KERAS_DAS_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // a NaN must not round to infinity
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

KERAS_DAS_INLINE Half to_half(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  // 65520 and more round to infinity.
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24, ties to even
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

KERAS_DAS_INLINE float convert_to(float x, const float*) { return x; }
KERAS_DAS_INLINE double convert_to(double x, const double*) { return x; }
KERAS_DAS_INLINE Half convert_to(float x, const Half*) { return to_half(x); }
KERAS_DAS_INLINE BFloat16 convert_to(float x, const BFloat16*) { return to_bfloat16(x); }

// ----- One sample

// A position consists of a whole pixel, which is the upper left corner of its cell, and a fraction. The order
// of corners is upper left, upper right, lower left, lower right. V and I are numbers or vectors below.

// -1 for true and 0 for false, as comparisons of vectors return.
template <class I>
KERAS_DAS_INLINE I as_mask(I lanes) {
  return lanes;
}
KERAS_DAS_INLINE int as_mask(bool value) { return -static_cast<int>(value); }

// Whether -1 < whole + fraction < size. False for NaN.
template <class A, class V>
KERAS_DAS_INLINE auto on_image(V whole, V fraction, int64_t size) {
  return as_mask(whole >= 0 || (whole == -1 && fraction > 0)) & as_mask(whole < static_cast<A>(size));
}

// Bit i is set if corner i of the cell at (row, column) is on the image.
template <class Int, class I>
KERAS_DAS_INLINE I corners_on_image(I row, I column, Int height, Int width) {
  const I top = as_mask(row >= 0), bottom = as_mask(row >= -1) & as_mask(row < height - 1);
  const I left = as_mask(column >= 0), right = as_mask(column >= -1) & as_mask(column < width - 1);
  return (top & left & 1) | (top & right & 2) | (bottom & left & 4) | (bottom & right & 8);
}

// The row and column of samples off the image: all corners of this cell are off the image.
constexpr int kNowhere = -2;

// The bilinear weights of the corners, multiplied by the value of the mask.
template <class V>
KERAS_DAS_INLINE void corner_weights(V fraction_y, V fraction_x, V modulation, V weights[4]) {
  const V below = fraction_y * modulation, above = (1 - fraction_y) * modulation;
  weights[0] = above * (1 - fraction_x);
  weights[1] = above * fraction_x;
  weights[2] = below * (1 - fraction_x);
  weights[3] = below * fraction_x;
}

// The gradients of a sample's offsets. `products` contains, for each corner, the sum over channels of its
// pixel times the gradient of the sample.
template <class A>
KERAS_DAS_INLINE void offset_gradients(A y, A x, A modulation, const A* products, A* grad_y, A* grad_x) {
  const A left = products[2] - products[0], right = products[3] - products[1];
  const A upper = products[1] - products[0], lower = products[3] - products[2];
  *grad_y = modulation * ((1 - x) * left + x * right);
  *grad_x = modulation * ((1 - y) * upper + y * lower);
}

// The gradient of a sample's mask, from the same `products`.
template <class A>
KERAS_DAS_INLINE A mask_gradient(A y, A x, const A* products) {
  return (1 - y) * ((1 - x) * products[0] + x * products[1]) + y * ((1 - x) * products[2] + x * products[3]);
}

}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_SAMPLING_H_
