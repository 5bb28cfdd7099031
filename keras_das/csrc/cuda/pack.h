// Loads and stores of several numbers at once.
#ifndef KERAS_DAS_CSRC_CUDA_PACK_H_
#define KERAS_DAS_CSRC_CUDA_PACK_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cuda/platform.h"
#include "sampling.h"

namespace keras_das {
namespace cuda {
namespace {

// Converts to the type of sums.
__device__ __forceinline__ float to_sum(float x) { return x; }
__device__ __forceinline__ double to_sum(double x) { return x; }
__device__ __forceinline__ float to_sum(Half x) { return to_float(x); }
__device__ __forceinline__ float to_sum(BFloat16 x) { return to_float(x); }

// Numbers that are loaded and stored together, in parts of at most 16 bytes.
template <class E, int V>
struct alignas(sizeof(E) * V < 16 ? sizeof(E) * V : 16) Pack {
  E lane[V];
};

template <int V, class E>
__device__ __forceinline__ Pack<E, V> load(const E* from) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Pack<E, V>*>(from);
#else
  Pack<E, V> pack;
  if (reinterpret_cast<uintptr_t>(from) % alignof(decltype(pack))) std::abort();  // a GPU reports an error
  std::memcpy(&pack, from, sizeof pack);
  return pack;
#endif
}

template <int V, class E>
__device__ __forceinline__ void store(E* to, const Pack<E, V>& pack) {
#if defined(__CUDACC__)
  *reinterpret_cast<Pack<E, V>*>(to) = pack;
#else
  if (reinterpret_cast<uintptr_t>(to) % alignof(decltype(pack))) std::abort();
  std::memcpy(to, &pack, sizeof pack);
#endif
}

// Adds to memory to which other threads add, too.
template <int V, class A>
__device__ __forceinline__ void add_atomically(A* to, const Pack<A, V>& pack) {
#pragma unroll
  for (int v = 0; v < V; ++v) atomicAdd(to + v, pack.lane[v]);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
template <>
__device__ __forceinline__ void add_atomically(float* to, const Pack<float, 2>& pack) {
  atomicAdd(reinterpret_cast<float2*>(to), make_float2(pack.lane[0], pack.lane[1]));
}
template <>
__device__ __forceinline__ void add_atomically(float* to, const Pack<float, 4>& pack) {
  atomicAdd(reinterpret_cast<float4*>(to),
            make_float4(pack.lane[0], pack.lane[1], pack.lane[2], pack.lane[3]));
}
#endif

}  // namespace
}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_PACK_H_
