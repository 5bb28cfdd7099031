// Memory of tasks, aligned copies of tensors, and parallel loops.
#ifndef KERAS_DAS_CSRC_CPU_MEMORY_H_
#define KERAS_DAS_CSRC_CPU_MEMORY_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common.h"
#include "cpu/simd.h"
#include "parallel.h"

namespace keras_das {
namespace KERAS_DAS_ISA {
namespace {

// Memory of one task, aligned to cache lines.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = static_cast<size_t>(max_of(count, 1)) * sizeof(A);
    if (posix_memalign(&memory_, 64, bytes)) throw std::bad_alloc();
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() { return static_cast<A*>(memory_); }
  void zero(int64_t count) { std::memset(memory_, 0, static_cast<size_t>(count) * sizeof(A)); }

 private:
  void* memory_ = nullptr;
};

// Calls `task(index)` for each index below `count`; see `parallel_for`.
template <class F>
void parallel(const Workers& workers, int64_t count, const F& task) {
  keras_das::parallel_for(
      workers, count, [](void* f, int64_t index) { (*static_cast<const F*>(f))(index); },
      const_cast<F*>(&task));
}

// If the channels of a pixel do not fill whole vectors, pixels straddle cache lines, and reading them takes
// twice as long. The kernels then work on a copy in which every pixel starts a vector, if the copy has at
// most this many bytes for one pass over one image. The results are the same.
constexpr int64_t kCopyBytes = int64_t{7} << 20;

// The number of elements of a pixel in such a copy.
template <class T>
int64_t aligned_channels(int64_t channels) {
  return round_up(channels, Simd<typename SumType<T>::type>::kLanes);
}

// A memcpy for sizes of a few vectors. The last vector overlaps the one before it.
inline void copy_bytes(const char* from, char* to, int64_t size) {
  if (size < kVectorBytes) {
    std::memcpy(to, from, static_cast<size_t>(size));
    return;
  }
  for (int64_t at = 0; at + kVectorBytes <= size; at += kVectorBytes) {
    std::memcpy(to + at, from + at, kVectorBytes);
  }
  std::memcpy(to + size - kVectorBytes, from + size - kVectorBytes, kVectorBytes);
}

// Copies `count` channels of each of `pixels` pixels. Leaves the gaps between them unchanged.
template <class T>
inline void copy_channels(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t pixels,
                          int64_t count) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    copy_bytes(reinterpret_cast<const char*>(from + pixel * from_stride),
               reinterpret_cast<char*>(to + pixel * to_stride), count * static_cast<int64_t>(sizeof(T)));
  }
}

}  // namespace
}  // namespace KERAS_DAS_ISA
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CPU_MEMORY_H_
