// Selection and the parallel loop: raw pointers in, no torch.
#include <algorithm>

#include "common/half.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "dequantize/dequantize.h"

namespace narrowcast {
namespace {

constexpr Variant<DequantizeGroupFn> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &dequantize_group_##name},
#include "dequantize/dequantize.inc"
#undef KERNEL
};
NC_VARIANT_LIST(dequantize_groups, DequantizeGroupFn, kVariants)

float load(const void* p, int64_t i, DType dtype) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(p)[i]
                                  : from_float16(static_cast<const uint16_t*>(p)[i]);
}

}  // namespace

void dequantize_groups_run(const DequantizeGroupsArgs& a) {
  if (a.rows == 0 || a.columns == 0) return;
  const DequantizeGroupFn kernel = select_dequantize_groups();
  const int64_t groups = a.columns / a.group, row_bytes = a.columns * a.bits / 8;
  constexpr int64_t kPiece =
      256;  // converted through a small buffer when the output is half precision
  const int64_t grain = std::max<int64_t>(1, 16384 / a.columns);
  parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    float piece[kPiece];
    for (int64_t n = begin; n < end; ++n)
      for (int64_t g = 0; g < groups; ++g) {
        const float scale = load(a.scale, n * groups + g, a.scale_dtype);
        const float offset = a.offset      ? load(a.offset, n * groups + g, a.scale_dtype)
                             : a.bits == 4 ? -8.0f * scale
                                           : 0.0f;
        for (int64_t k = 0; k < a.group; k += kPiece) {
          const int64_t count = std::min(kPiece, a.group - k),
                        first = n * a.columns + g * a.group + k;
          const uint8_t* codes = a.packed + n * row_bytes + (g * a.group + k) * a.bits / 8;
          if (a.out_dtype == DType::kFloat32) {
            kernel(codes, a.bits, scale, offset, static_cast<float*>(a.out) + first, count);
            continue;
          }
          kernel(codes, a.bits, scale, offset, piece, count);
          uint16_t* out = static_cast<uint16_t*>(a.out) + first;
          if (a.out_dtype == DType::kBFloat16)
            for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(piece[i]);
          else
            for (int64_t i = 0; i < count; ++i) out[i] = to_float16(piece[i]);
        }
      }
  });
}

}  // namespace narrowcast
