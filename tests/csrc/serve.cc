// A program that runs the kernels for test_aarch64.py, which cannot load them: it reads calls from the
// standard input and writes the results to the standard output.
#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "deformable_conv2d.h"

extern "C" {
int keras_das_geometry(const int64_t*, const int64_t*, const int64_t*, int64_t*, keras_das::Geometry*, char*,
                       int64_t);
int keras_das_forward(int, const keras_das::Geometry*, void* const*, int64_t);
int keras_das_backward(int, const keras_das::Geometry*, void* const*, int64_t);
}

namespace {

constexpr int kBuffers = 10;

struct Request {
  int64_t function;  // 0: geometry, 1: forward, 2: backward
  int64_t dtype, threads;
  int64_t inputs[4], kernel[4], settings[10];
  int64_t bytes[kBuffers];  // of each buffer; 0: null
};

struct Reply {
  int64_t status, sizes[2];
  char message[256];
};

}  // namespace

int main() {
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) {
    std::array<std::vector<double>, kBuffers> memory;
    std::array<void*, kBuffers> buffers = {};
    for (int i = 0; i < kBuffers; ++i) {
      const size_t bytes = static_cast<size_t>(request.bytes[i]);
      if (bytes == 0) continue;
      memory[i].resize(bytes / sizeof(double) + 1);
      buffers[i] = memory[i].data();
      if (std::fread(buffers[i], 1, bytes, stdin) != bytes) return 1;
    }
    Reply reply = {};
    keras_das::Geometry geometry;
    reply.status = keras_das_geometry(request.inputs, request.kernel, request.settings, reply.sizes,
                                      &geometry, reply.message, sizeof(reply.message));
    if (!reply.status && request.function) {
      const auto call = request.function == 1 ? keras_das_forward : keras_das_backward;
      reply.status = call(static_cast<int>(request.dtype), &geometry, buffers.data(), request.threads);
    }
    std::fwrite(&reply, sizeof(reply), 1, stdout);
    for (int i = 0; !reply.status && i < kBuffers; ++i) {
      if (buffers[i]) std::fwrite(buffers[i], 1, static_cast<size_t>(request.bytes[i]), stdout);
    }
    std::fflush(stdout);
  }
  return 0;
}
