// Pooling of int8 images; x and out lie as NHWC.
//
//   max_pool2d_int8: the largest code of the window's taps inside the image (scale and zero point
//   pass through). A window without such taps gives -128 (int8) or 0 (uint8).
//   avg_pool2d_int8: y = sum(x - x_zero_point) * (x_scale / count) over the count taps inside the
//   image: padding is not counted. Stored as the epilogue says (common/epilogue.h).
//
// Numerics: the sum is exact in int32; then one division, one product, all in float32, the same
// bits in every kernel.
#pragma once
#include "common/epilogue.h"
#include "common/window.h"

namespace narrowcast {

constexpr int64_t kPoolMostTaps = int64_t{1} << 22;  // 2^22 * 510 < 2^31

struct PoolArgs {
  const void* x = nullptr;
  int64_t images = 0, channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  Window window;
  bool is_signed = false, is_max = false;
  float x_scale = 1.0f;      // avg
  int32_t x_zero_point = 0;  // avg
  Epilogue epilogue;         // only `out`, `ld_out`, `out_dtype` and, for avg, the quantiser
};

void pool_run(const PoolArgs& args);

// Output row `row` of [images * out_height], channels [c0, c1).
using PoolRowFn = void (*)(const PoolArgs& args, int64_t row, int64_t c0, int64_t c1);
struct PoolKernel {
  PoolRowFn max, average;
};
#define KERNEL(name, isa) extern const PoolKernel pool_##name;
#include "pool/pool.inc"
#undef KERNEL

}  // namespace narrowcast
