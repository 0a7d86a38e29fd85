// dequantize_groups: w[n, k] = q[n, k] * scale[n, k / group] + offset[n, k / group].
//
//   packed  uint8 [N, K * bits / 8] row-major. bits 4: two codes 0..15 per byte, the low nibble at
//   even k.
//           bits 8: int8 codes -128..127.
//   scale   [N, K / group], float32 or float16, any sign.
//   offset  same shape and dtype as scale, in real units (a GGUF minimum, or -zero * scale).
//   Without it the
//           offset is -8 * scale for bits 4 (codes centred on 8) and 0 for bits 8.
//
// Numerics: one product and one sum in float32, not fused, then one rounding to the output dtype.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace narrowcast {

struct DequantizeGroupsArgs {
  const uint8_t* packed;
  const void* scale;
  const void* offset;  // nullptr: see above
  void* out;           // [N, K] row-major
  int64_t rows, columns, group;
  int bits;
  DType scale_dtype, out_dtype;
};

void dequantize_groups_run(const DequantizeGroupsArgs& args);

// One row piece: `count` codes of one group, all with the same scale and offset. count is even for
// bits 4.
using DequantizeGroupFn = void (*)(const uint8_t* packed, int bits, float scale, float offset,
                                   float* out, int64_t count);
#define KERNEL(name, isa)                                                                  \
  void dequantize_group_##name(const uint8_t* packed, int bits, float scale, float offset, \
                               float* out, int64_t count);
#include "dequantize/dequantize.inc"
#undef KERNEL

}  // namespace narrowcast
