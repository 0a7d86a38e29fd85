// Launching a kernel: the only place with <<<>>>. Under g++ the emulator runs the grid instead.
#pragma once
#include "common/check.h"
#include "common/ptx.cuh"

namespace narrowcast {

using Stream = void*;  // a cudaStream_t

#ifdef __CUDACC__

inline void check_cuda(const char* op, cudaError_t error) {
  NC_CHECK(error == cudaSuccess, op, "CUDA must launch the kernel, got ", cudaGetErrorName(error),
           " (", cudaGetErrorString(error), ")");
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)  // more than every kernel gets without asking
    check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(op, cudaGetLastError());
}

#else

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream, const Arguments&... arguments) {
  emulator::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

#endif

}  // namespace narrowcast
