// The CUDA language, and the constants of all kernels. A C++ compiler uses cuda_on_host.h of the tests
// instead, to run the kernels on the host.
#ifndef KERAS_DAS_CSRC_CUDA_PLATFORM_H_
#define KERAS_DAS_CSRC_CUDA_PLATFORM_H_

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_on_host.h"
#endif

#include <cstdint>

namespace keras_das {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;      // of a block
constexpr int64_t kBlocks = 4096;  // enough to fill a GPU several times; also determines the parts of sums

}  // namespace cuda
}  // namespace keras_das

#endif  // KERAS_DAS_CSRC_CUDA_PLATFORM_H_
