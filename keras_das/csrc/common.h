// Arithmetic of sizes, shared by the kernels for CPUs and for CUDA.
//
// Included once in each build of either, inside a namespace named after the instruction set: builds share no
// code, so a processor never runs instructions that it lacks.
#ifndef KERAS_DAS_CSRC_COMMON_H_
#define KERAS_DAS_CSRC_COMMON_H_

#include <cstdint>

#include "deformable_conv2d.h"

#if defined(__CUDACC__)
#define KERAS_DAS_INLINE __host__ __device__ __forceinline__
#else
// Compilers judge by size and would call functions of a few instructions.
#define KERAS_DAS_INLINE inline __attribute__((always_inline))
#endif

namespace keras_das {
namespace KERAS_DAS_ISA {

KERAS_DAS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
KERAS_DAS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// a / b, for numbers that are not negative.
KERAS_DAS_INLINE int64_t quotient(int64_t a, int64_t b) {
#if defined(KERAS_DAS_SLOW_DIVISION)
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
#endif
  return a / b;
}

KERAS_DAS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
KERAS_DAS_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The start of part `index`, if `total` is divided into `parts` of about the same size.
KERAS_DAS_INLINE int64_t part_start(int64_t total, int64_t parts, int64_t index) {
  const int64_t size = quotient(total, parts);
  return size * index + min_of(total - size * parts, index);
}

KERAS_DAS_INLINE bool is_depthwise(const Geometry& geometry) {
  return geometry.groups == geometry.channels && geometry.filters == geometry.channels;
}

}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_COMMON_H_
