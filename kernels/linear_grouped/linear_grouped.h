// linear_grouped: y[m, n] = post_activation(activation(sum_k x[m, k] * w[n, k] + bias[n]) +
// residual[m, n]) with int4 or int8 weights in groups along K, w[n, k] = q[n, k] * scale[n, k /
// group] + offset[n, k / group] (layout and implied offset: dequantize/dequantize.h). group is a
// multiple of 32.
//
// activation_bits 16: x enters as float32; products and sums in float32.
// activation_bits 8:  x is quantised inside, symmetric int8 per block of a = gcd(group, 128), as
// quantize/quantize.h does. With g the group of block b and c = 8 (bits 4) or 0 (bits 8):
//
//   y = sum_b xs[m, b] * (scale[n, g] * P + (offset[n, g] + c * scale[n, g]) * S)
//   P = sum_{k in b} xq * (q - c),  S = sum_{k in b} xq
//
// P and S are exact in int32; the sum over b is float32. Without offset the second term is 0.
//
// Packed weights. A panel holds 16 rows of W; the last one is filled up with zeros. In order:
//   codes    [K / k4][16] dwords: one dword of each row. bits 4: the 8 codes of 8 successive k, as
//   they lie in the
//            row. bits 8: 4 successive k, with the sign bit flipped, so that a code is q + 128 >=
//            0.
//   scale    [K / a][16] float16 or float32, repeated where a < group
//   offset   the same, when there is one
// and bytes up to a multiple of 64. All a kernel reads of a panel lies in one stream.
#pragma once
#include <cstdint>

#include "common/epilogue.h"
#include "common/tensor_view.h"

namespace narrowcast {

constexpr int kGroupedPanel = 16;    // rows of W per panel
constexpr int kGroupedMaxRows = 12;  // rows of x per kernel call

struct GroupedLayout {
  int64_t n, k, group;
  int64_t block;  // a
  int bits;
  bool half;  // scales are float16
  bool has_offset;
  int64_t code_bytes, scale_bytes, panel_bytes;  // per panel; scale_bytes: of the scales alone
};

// Canonical weights, row-major and contiguous.
struct GroupedSource {
  const uint8_t* codes;
  const void* scale;
  const void* offset;
};
// Packs panels [first, first + count) to `out`.
void grouped_pack(const GroupedLayout& layout, const GroupedSource& source, int64_t first,
                  int64_t count, uint8_t* out);
void grouped_pack_all(const GroupedLayout& layout, const GroupedSource& source, uint8_t* out);
int64_t grouped_packed_bytes(const GroupedLayout& layout);

struct LinearGroupedArgs {
  GroupedLayout layout;
  const void* x;  // [m, k] row-major
  DType x_dtype;
  int64_t m;
  int activation_bits;
  const uint8_t* panels;  // packed, 64-byte aligned, or nullptr: `source` is packed on the way
  GroupedSource source;
  Epilogue epilogue;
};

// Bytes of scratch that linear_grouped_run needs, 64-byte aligned.
int64_t linear_grouped_scratch(const LinearGroupedArgs& args);
void linear_grouped_run(const LinearGroupedArgs& args, void* scratch);

// A tile of `ld` rows of x as the kernels read it, the rows interleaved so that it is one stream.
// Per block: sum of the float values, or scale, scaled sum and start of the quantised ones.
// activation_bits 8, 4-bit weights: the even k of each 8 come before the odd ones, as the low and
// the high nibbles of a dword need them.
struct GroupedTile {
  int8_t* xq;   // activation_bits 8:  [k / 4][ld][4]
  float* x;     // activation_bits 16: [k][ld]
  float* xs;    // activation_bits 8:  [k / block][ld]
  float* xsum;  // [k / block][ld]; activation_bits 8: xs * sum of xq
  int32_t*
      start;  // activation_bits 8:  [k / block][ld], -centre * sum of xq: where integer sums start
  int ld;
};

// Writes row r of the tile.
using GroupedPrepareFn = void (*)(const GroupedLayout& layout, const void* x, DType dtype, int r,
                                  const GroupedTile& tile);
// One panel times a tile: acc[r * ld + j] = the sum over k, j < 16.
using GroupedPanelFn = void (*)(const GroupedLayout& layout, const uint8_t* panel,
                                const GroupedTile& tile, float* acc, int64_t ld);
// Interleaves `dwords` dwords of each of 16 rows, row_bytes apart, and flips bits.
using GroupedPackFn = void (*)(const uint8_t* rows, int64_t row_bytes, int64_t dwords,
                               uint32_t flip, uint8_t* out);

// The epilogue of columns n .. n + count - 1 of row m, whose sums are acc[0 .. count - 1].
using GroupedFinishFn = void (*)(const Epilogue& epilogue, const float* acc, int64_t m, int64_t n,
                                 int64_t count);

struct GroupedKernels {
  GroupedPanelFn panel8, panel16;  // by activation_bits
  GroupedPrepareFn prepare8, prepare16;
  GroupedPackFn pack;
  GroupedFinishFn finish;
};

#define KERNEL(name, isa) extern const GroupedKernels linear_grouped_##name;
#include "linear_grouped/linear_grouped.inc"
#undef KERNEL

}  // namespace narrowcast
