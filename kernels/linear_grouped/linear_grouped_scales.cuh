// Scales and offsets of groups, which both kernels of linear_grouped read as they are given.
#pragma once
#include "common/epilogue.cuh"
#include "linear_grouped/linear_grouped_cuda.h"

namespace narrowcast {
namespace {

__device__ __forceinline__ float load_scale(const GroupedLayout& layout, const void* scales,
                                            int64_t n, int64_t group) {
  const int64_t at = n * (layout.k / layout.group) + group;
  return load_float_device(scales, at, layout.half ? DType::kFloat16 : DType::kFloat32);
}

}  // namespace
}  // namespace narrowcast
