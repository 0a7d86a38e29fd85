// Selection and the parallel loops of dequantize_gguf and dequantize_int8: raw pointers in, no
// torch.
#include <algorithm>

#include "common/parallel.h"
#include "common/registry.h"
#include "common/tensor.h"
#include "dequantize/dequantize_gguf.h"

namespace narrowcast {
namespace {

constexpr Variant<DequantizeGgufFn> kGgufVariants[] = {
#define KERNEL(name, isa) {#name, isa, &dequantize_gguf_##name},
#include "dequantize/dequantize.inc"
#undef KERNEL
};
NC_VARIANT_LIST(dequantize_gguf, DequantizeGgufFn, kGgufVariants)

constexpr Variant<DequantizeInt8Fn> kInt8Variants[] = {
#define KERNEL(name, isa) {#name, isa, &dequantize_int8_##name},
#include "dequantize/dequantize.inc"
#undef KERNEL
};
NC_VARIANT_LIST(dequantize_int8, DequantizeInt8Fn, kInt8Variants)

constexpr int64_t kGrain = 16384;  // elements: a few microseconds

}  // namespace

void dequantize_gguf_run(const DequantizeGgufArgs& a) {
  const DequantizeGgufFn kernel = select_dequantize_gguf();
  const GgufLayout layout = kGgufLayouts[static_cast<int>(a.type)];
  parallel_for(0, a.count, kGrain / layout.elements, [&](int64_t begin, int64_t end) {
    uint8_t* out =
        static_cast<uint8_t*>(a.out) + begin * layout.elements * element_size(a.out_dtype);
    kernel(a.type, a.blocks + begin * layout.bytes, end - begin, out, a.out_dtype);
  });
}

void dequantize_int8_run(const DequantizeInt8Args& a) {
  if (a.rows == 0 || a.columns == 0) return;
  const DequantizeInt8Fn kernel = select_dequantize_int8();
  if (a.scale_stride == 0)  // one scale: where a row ends does not matter
    return parallel_for(0, a.rows * a.columns, kGrain, [&](int64_t begin, int64_t end) {
      kernel(static_cast<const uint8_t*>(a.q) + begin, a.is_unsigned,
             a.zero_point ? *a.zero_point : 0, *a.scale,
             static_cast<uint8_t*>(a.out) + begin * element_size(a.out_dtype), a.out_dtype,
             end - begin);
    });
  const int64_t groups = a.columns / a.group;
  parallel_for(0, a.rows, std::max<int64_t>(1, kGrain / a.columns),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r)
                   for (int64_t g = 0; g < groups; ++g) {
                     const int64_t at = r * a.scale_stride + g, first = r * a.columns + g * a.group;
                     kernel(static_cast<const uint8_t*>(a.q) + first, a.is_unsigned,
                            a.zero_point ? a.zero_point[at] : 0, a.scale[at],
                            static_cast<uint8_t*>(a.out) + first * element_size(a.out_dtype),
                            a.out_dtype, a.group);
                   }
               });
}

}  // namespace narrowcast
