// Vectors of the instruction set that the including file is compiled for. See common.h for the namespace.
#ifndef KERAS_DAS_CSRC_CPU_SIMD_H_
#define KERAS_DAS_CSRC_CPU_SIMD_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "sampling.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace keras_das {
namespace KERAS_DAS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 12;  // of a matrix product in registers: kRows x 2 sums, 2 columns, 1 broadcast
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRows = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kRows = 6;
#endif

template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
  typedef int64_t Wide __attribute__((vector_size(2 * kVectorBytes)));  // as many lanes
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int;
  typedef I Wide;
  static constexpr int kLanes = kVectorBytes / 8;
};
template <class A>
using Vec = typename Simd<A>::V;
template <class A>
using Ints = typename Simd<A>::I;
using VF = Vec<float>;
using VD = Vec<double>;

template <class A>
KERAS_DAS_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // compilers omit the subtraction, which changes no value, not even -0
}

// ----- Loads and stores of all lanes, at any address

template <class A>
KERAS_DAS_INLINE Vec<A> load(const A* from) {
  Vec<A> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class A>
KERAS_DAS_INLINE void store(A* to, Vec<A> v) {
  std::memcpy(to, &v, sizeof v);
}

KERAS_DAS_INLINE VF load(const Half* from) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VF v;
  for (int i = 0; i < Simd<float>::kLanes; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

KERAS_DAS_INLINE VF load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (VF)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (VF)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  VF v;
  for (int i = 0; i < Simd<float>::kLanes; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

// ----- Loads and stores of the first `n` lanes, 0 <= n <= lanes. Other memory is not accessed; other lanes
// are 0

template <class T>
KERAS_DAS_INLINE Vec<typename SumType<T>::type> load_first(const T* from, int n) {
  T copy[Simd<typename SumType<T>::type>::kLanes] = {};
  std::memcpy(copy, from, n * sizeof(T));
  return load(static_cast<const T*>(copy));
}

#if defined(__AVX512F__)
KERAS_DAS_INLINE __mmask16 first16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

template <>
KERAS_DAS_INLINE VF load_first(const float* from, int n) {
  return (VF)_mm512_maskz_loadu_ps(first16(n), from);
}
template <>
KERAS_DAS_INLINE VD load_first(const double* from, int n) {
  return (VD)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first16(n)), from);
}
template <>
KERAS_DAS_INLINE VF load_first(const Half* from, int n) {
  return (VF)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n), from));
}
template <>
KERAS_DAS_INLINE VF load_first(const BFloat16* from, int n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first16(n), from);
  return (VF)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
KERAS_DAS_INLINE void store_first(float* to, VF v, int n) {
  _mm512_mask_storeu_ps(to, first16(n), (__m512)v);
}
KERAS_DAS_INLINE void store_first(double* to, VD v, int n) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first16(n)), (__m512d)v);
}
#elif defined(__AVX2__)
KERAS_DAS_INLINE __m256i first8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
KERAS_DAS_INLINE __m256i first4(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

template <>
KERAS_DAS_INLINE VF load_first(const float* from, int n) {
  return (VF)_mm256_maskload_ps(from, first8(n));
}
template <>
KERAS_DAS_INLINE VD load_first(const double* from, int n) {
  return (VD)_mm256_maskload_pd(from, first4(n));
}
KERAS_DAS_INLINE void store_first(float* to, VF v, int n) { _mm256_maskstore_ps(to, first8(n), (__m256)v); }
KERAS_DAS_INLINE void store_first(double* to, VD v, int n) { _mm256_maskstore_pd(to, first4(n), (__m256d)v); }
#else
template <class A>
KERAS_DAS_INLINE void store_first(A* to, Vec<A> v, int n) {
  std::memcpy(to, &v, n * sizeof(A));
}
#endif

// Rounds to a 16-bit type.
template <class T>
KERAS_DAS_INLINE void store_first(T* to, VF v, int n) {
  for (int i = 0; i < n; ++i) to[i] = convert_to(v[i], to);
}

// ----- Arithmetic for which there are no operators

template <class A>
KERAS_DAS_INLINE Vec<A> select(Ints<A> condition, Vec<A> yes, Vec<A> no) {
  return condition ? yes : no;
}

template <class A>
KERAS_DAS_INLINE Vec<A> floor(Vec<A> v) {
  for (int i = 0; i < Simd<A>::kLanes; ++i) v[i] = std::floor(v[i]);
  return v;
}
#if defined(__AVX512F__)
template <>
KERAS_DAS_INLINE VF floor<float>(VF v) {
  return (VF)_mm512_floor_ps((__m512)v);
}
template <>
KERAS_DAS_INLINE VD floor<double>(VD v) {
  return (VD)_mm512_floor_pd((__m512d)v);
}
#elif defined(__AVX2__)
template <>
KERAS_DAS_INLINE VF floor<float>(VF v) {
  return (VF)_mm256_floor_ps((__m256)v);
}
template <>
KERAS_DAS_INLINE VD floor<double>(VD v) {
  return (VD)_mm256_floor_pd((__m256d)v);
}
#endif

// Separates the first and second elements of consecutive pairs.
template <class A>
KERAS_DAS_INLINE void unzip(Vec<A> low, Vec<A> high, Vec<A>* first, Vec<A>* second) {
  constexpr int L = Simd<A>::kLanes;
  Ints<A> even;
  for (int i = 0; i < L; ++i) even[i] = 2 * i;
#if defined(__clang__)
  for (int i = 0; i < L; ++i) {
    const int at = 2 * i % L;
    (*first)[i] = i < L / 2 ? low[at] : high[at];
    (*second)[i] = i < L / 2 ? low[at + 1] : high[at + 1];
  }
#else
  *first = __builtin_shuffle(low, high, even);
  *second = __builtin_shuffle(low, high, even + 1);
#endif
}

// Computes the sum of the lanes of each of four vectors.
template <class A>
KERAS_DAS_INLINE void sum_lanes(const Vec<A> (&v)[4], A* sums) {
  for (int k = 0; k < 4; ++k) {
    A lanes[Simd<A>::kLanes];
    store(lanes, v[k]);
    for (int width = Simd<A>::kLanes / 2; width; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    sums[k] = lanes[0];
  }
}
#if defined(__AVX2__)
KERAS_DAS_INLINE __m128 sum4(__m128 a, __m128 b, __m128 c, __m128 d) {
  return _mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, d));
}
KERAS_DAS_INLINE __m128 fold(VF v) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  const __m256 half = (__m256)v;
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
template <>
KERAS_DAS_INLINE void sum_lanes<float>(const VF (&v)[4], float* sums) {
  _mm_storeu_ps(sums, sum4(fold(v[0]), fold(v[1]), fold(v[2]), fold(v[3])));
}
#endif

}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CPU_SIMD_H_
