// Products of TF32 numbers on tensor cores, which GPUs of compute capability 8.0 and newer have.
#ifndef KERAS_DAS_CSRC_CUDA_TENSOR_CORES_H_
#define KERAS_DAS_CSRC_CUDA_TENSOR_CORES_H_

#include <cstdint>

#include "cuda/platform.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define KERAS_DAS_TENSOR_CORES 0
#else
#define KERAS_DAS_TENSOR_CORES 1
#endif

namespace keras_das {
namespace cuda {
namespace {

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
#endif

// Rounds a finite number to TF32: to the nearest if `half` is half of the last digit, towards 0 if it is 0.
__device__ __forceinline__ float to_tf32(float value, uint32_t half) {
  return from_bits((bits_of(value) + half) & ~uint32_t{0x1fff});
}

#if defined(__CUDACC__) && KERAS_DAS_TENSOR_CORES
// Adds a product of TF32 numbers, 16 rows by 8 columns with sums over 8 terms, to `sums`. A warp computes it.
// With g = lane / 4 and t = lane % 4, a lane has these elements:
//   left: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   right: (t, g), (t + 4, g)
//   sums: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const float (&left)[4],
                                              const float (&right)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(bits_of(left[0])), "r"(bits_of(left[1])), "r"(bits_of(left[2])), "r"(bits_of(left[3])),
        "r"(bits_of(right[0])), "r"(bits_of(right[1])));
#endif
}
#endif

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_TENSOR_CORES_H_
