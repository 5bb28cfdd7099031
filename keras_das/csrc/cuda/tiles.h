// The sums of one tile of a matrix product, distributed over the threads of a block.
#ifndef KERAS_DAS_CSRC_CUDA_TILES_H_
#define KERAS_DAS_CSRC_CUDA_TILES_H_

#include <cmath>

#include "cuda/pack.h"
#include "cuda/platform.h"
#include "cuda/tensor_cores.h"

namespace keras_das {
namespace cuda {
namespace {

// A block computes a tile of the result, from `kStep` terms of each sum at a time.
constexpr int kStep = 16;
template <class A>
constexpr int kTileRows = sizeof(A) == 4 ? 128 : 64;
template <class A>
constexpr int kTileColumns = sizeof(A) == 4 ? 128 : 64;

// The part of a tile that a thread computes with ordinary instructions: neighboring rows and columns.
template <class T, class A, class P, bool kOnTensorCores>
struct TileSums {
  static constexpr int kRows = kTileRows<A> / 16, kColumns = kTileColumns<A> / 16;  // of a thread
  static_assert(kThreads == 16 * 16, "one thread for each part");
  // The operands of one step: (terms of the sum, rows) and (terms of the sum, columns).
  struct alignas(16) Shared {
    A left[kStep][kTileRows<A> + 4], right[kStep][kTileColumns<A> + 4];
  };

  // Both store an operand. They return whether `add` needs to know about the value.
  static __device__ __forceinline__ bool put_left(Shared* tiles, int k, int row, A value) {
    tiles->left[k][row] = value;
    return false;
  }
  static __device__ __forceinline__ bool put_right(Shared* tiles, int k, int column, A value) {
    tiles->right[k][column] = value;
    return false;
  }

  __device__ __forceinline__ void add(const Shared& tiles, bool) {
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      const Pack<A, kRows> left = load<kRows>(&tiles.left[k][row(0)]);
      const Pack<A, kColumns> right = load<kColumns>(&tiles.right[k][column(0)]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i][j] += left.lane[i] * right.lane[j];
      }
    }
  }

  // The row and column in the tile of the sum at (i, j).
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 16 * kRows + i; }
  static __device__ __forceinline__ int column(int j) { return threadIdx.x % 16 * kColumns + j; }
  __device__ __forceinline__ A& at(int i, int j) { return sums[i][j]; }

  A sums[kRows][kColumns] = {};
};

#if KERAS_DAS_TENSOR_CORES
// The part that a thread computes on tensor cores. TF32 numbers have the range of a float and 10 bits after
// the point. This represents both 16-bit types exactly, and so the kernel and the gradient of the output, if
// `T` is one of them. A float is split into two terms: the nearest TF32 number, and the rest. The product of
// two rests is left out, because it is below the last digit of a float.
template <class T, class P>
struct TileSums<T, float, P, true> {
  static constexpr bool kFloats = sizeof(T) == 4;
  static constexpr bool kSplitsLeft = kFloats || P::kLeftIsSample;
  static constexpr bool kSplitsRight = kFloats;
  static constexpr bool kSplits = kSplitsLeft || kSplitsRight;
  // A warp computes `kDown` by `kAcross` of the rectangles of 16 rows and 8 columns that tensor cores compute
  // at a time.
  static constexpr int kDeep = 8, kWarpsAcross = 4, kWarpsDown = kThreads / kWarp / kWarpsAcross;
  static constexpr int kDown = kTileRows<float> / kWarpsDown / 16,
                       kAcross = kTileColumns<float> / kWarpsAcross / 8;
  static constexpr int kRows = 2 * kDown, kColumns = 2 * kAcross;  // of a thread
  // The order of an operand is that in memory. In both orders, the 32 numbers that a warp reads are in 32
  // banks.
  template <int kSize, bool kAlong>
  struct Operand {
    static constexpr int kRow = kAlong ? kStep + 4 : kSize + 8;
    float numbers[kAlong ? kSize * kRow : kStep * kRow];
    static __device__ __forceinline__ int index(int k, int i) { return kAlong ? i * kRow + k : k * kRow + i; }
  };
  struct alignas(16) Shared {
    Operand<kTileRows<float>, P::kLeftAlong> left;
    Operand<kTileColumns<float>, P::kRightAlong> right;
  };

  static __device__ __forceinline__ bool put_left(Shared* tiles, int k, int row, float value) {
    return put(&tiles->left, k, row, value);
  }
  static __device__ __forceinline__ bool put_right(Shared* tiles, int k, int column, float value) {
    return put(&tiles->right, k, column, value);
  }

  // Tensor cores truncate sums, and ordinary additions round. Therefore sums on tensor cores are short.
  __device__ __forceinline__ void add(const Shared& tiles, bool infinite) {
    if (kSplits && infinite) return add_ordinarily(tiles);
    constexpr int kDeeps = kStep / kDeep;
    const int lane = threadIdx.x % kWarp, across = lane / 4, along = lane % 4;
    float right[kDeeps][kAcross][2], right_rest[kDeeps][kAcross][2];
#pragma unroll
    for (int deep = 0; deep < kDeeps; ++deep) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = deep * kDeep + along + 4 * e;
          const float value = tiles.right.numbers[tiles.right.index(k, first_column() + 8 * j + across)];
          split<kSplitsRight>(value, &right[deep][j][e], &right_rest[deep][j][e]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      float left[kDeeps][4], left_rest[kDeeps][4];
#pragma unroll
      for (int deep = 0; deep < kDeeps; ++deep) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = deep * kDeep + along + e / 2 * 4, row = first_row() + 16 * i + across + e % 2 * 8;
          split<kSplitsLeft>(tiles.left.numbers[tiles.left.index(k, row)], &left[deep][e],
                             &left_rest[deep][e]);
        }
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        float products[4] = {};
#pragma unroll
        for (int deep = 0; deep < kDeeps; ++deep) {
          if (kSplitsRight) multiply_tf32(products, left[deep], right_rest[deep][j]);
          if (kSplitsLeft) multiply_tf32(products, left_rest[deep], right[deep][j]);
        }
#pragma unroll
        for (int deep = 0; deep < kDeeps; ++deep) multiply_tf32(products, left[deep], right[deep][j]);
#pragma unroll
        for (int e = 0; e < 4; ++e) totals[i][j][e] += products[e];
      }
    }
  }

  static __device__ __forceinline__ int row(int i) {
    return first_row() + i / 2 * 16 + i % 2 * 8 + threadIdx.x % kWarp / 4;
  }
  static __device__ __forceinline__ int column(int j) {
    return first_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
  }
  __device__ __forceinline__ float& at(int i, int j) { return totals[i / 2][j / 2][i % 2 * 2 + j % 2]; }

 private:
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x / kWarp / kWarpsAcross * kDown * 16;
  }
  static __device__ __forceinline__ int first_column() {
    return threadIdx.x / kWarp % kWarpsAcross * kAcross * 8;
  }

  // Returns whether the number cannot be split, because products of its terms could overflow, or is NaN.
  template <class Operand>
  static __device__ __forceinline__ bool put(Operand* operand, int k, int i, float value) {
    operand->numbers[operand->index(k, i)] = value;
    return kSplits && !(std::fabs(value) < kLargest);
  }

  template <bool kSplit>
  static __device__ __forceinline__ void split(float value, float* nearest, float* rest) {
    *nearest = kSplit ? to_tf32(value, 1 << 12) : value;
    *rest = kSplit ? to_tf32(value - *nearest, 0) : 0.f;
  }

  __device__ void add_ordinarily(const Shared& tiles) {
#pragma unroll 1
    for (int k = 0; k < kStep; ++k) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float right = tiles.right.numbers[tiles.right.index(k, column(j))];
#pragma unroll
        for (int i = 0; i < kRows; ++i) at(i, j) += tiles.left.numbers[tiles.left.index(k, row(i))] * right;
      }
    }
  }

  static constexpr float kLargest = 0x1p64f;

  float totals[kDown][kAcross][4] = {};
};
#endif

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_TILES_H_
