// dequantize_gguf: the block types of GGUF files to floating point, bit for bit what ggml defines.
//
//   F32 F16 BF16      plain elements.
//   Q4_0 Q5_0 Q8_0    32 elements: float16 d, codes.             w = d * q, q centred on 0
//   Q4_1 Q5_1         32 elements: float16 d, m, codes.          w = d * q + m
//   Q4_K Q5_K         256 elements: float16 d, dmin, eight 6-bit pairs (s, t), codes.
//                                                                w = (d * s) * q - dmin * t
//   Q6_K              256 elements: codes, sixteen int8 s, d.    w = (d * s) * q
// Layouts: ggml-common.h of ggml. Blocks lie back to back at any byte offset.
//
// Numerics: the products and sums above in float32, in this order, not fused; then one rounding to
// the output dtype. NaN and Inf scales follow IEEE arithmetic.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace narrowcast {

enum class GgufType : int32_t {
  kF32,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K
};

struct GgufLayout {
  const char* name;
  int elements, bytes;  // of one block
};
constexpr GgufLayout kGgufLayouts[] = {
    // in the order of GgufType
    {"F32", 1, 4},      {"F16", 1, 2},      {"BF16", 1, 2},     {"Q4_0", 32, 18},
    {"Q4_1", 32, 20},   {"Q5_0", 32, 22},   {"Q5_1", 32, 24},   {"Q8_0", 32, 34},
    {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210},
};

struct DequantizeGgufArgs {
  const uint8_t* blocks;
  void* out;
  int64_t count;  // blocks
  GgufType type;
  DType out_dtype;
};

void dequantize_gguf_run(const DequantizeGgufArgs& args);

// dequantize_int8: x[r, k] = float(q[r, k] - zero_point[r, k / group]) * scale[r, k / group].
//
//   q           int8 or uint8 [rows, columns] row-major
//   scale       float32 [rows, columns / group]; zero_point int32, same shape, or nullptr for 0
// The difference is taken in int32 (modulo 2^32); one rounding to float32, one per product, one to
// the output dtype.
struct DequantizeInt8Args {
  const void* q;
  const float* scale;
  const int32_t* zero_point;
  void* out;
  int64_t rows, columns, group;
  int64_t scale_stride;  // scales per row; 0 when one scale serves the whole tensor
  bool is_unsigned;
  DType out_dtype;
};

void dequantize_int8_run(const DequantizeInt8Args& args);

// `count` whole blocks, or `count` int8 codes that share scale and zero point, to `out` in
// out_dtype.
using DequantizeGgufFn = void (*)(GgufType type, const uint8_t* blocks, int64_t count, void* out,
                                  DType out_dtype);
using DequantizeInt8Fn = void (*)(const void* q, bool is_unsigned, int32_t zero_point, float scale,
                                  void* out, DType out_dtype, int64_t count);
#define KERNEL(name, isa)                                                                       \
  void dequantize_gguf_##name(GgufType type, const uint8_t* blocks, int64_t count, void* out,   \
                              DType out_dtype);                                                 \
  void dequantize_int8_##name(const void* q, bool is_unsigned, int32_t zero_point, float scale, \
                              void* out, DType out_dtype, int64_t count);
#include "dequantize/dequantize.inc"
#undef KERNEL

}  // namespace narrowcast
