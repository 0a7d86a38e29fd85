// linear_grouped: y[m, n] = post_activation(activation(sum_k x[m, k] * w[n, k] + bias[n]) +
// residual[m, n]) with int4 or int8 weights in groups along K, w[n, k] = q[n, k] * scale[n, k /
// group] + offset[n, k / group] (layout and implied offset: dequantize/dequantize.h). group is a
// multiple of 32.
//
// activation_bits says with how many bits an element of x enters the products. Whatever the dtype
// of x, with a = gcd(group, 128), g the group of block b of a columns, c = 8 (bits 4) or 0 (bits
// 8):
//
//   8   symmetric int8 per block of a, as quantize/quantize.h does.
//         y = sum_b xs[m, b] * (scale[n, g] * P + (offset[n, g] + c * scale[n, g]) * S)
//   16  symmetric int16 per row, xs[m] = absmax of the row / 32639; a row with a NaN or an infinity
//       gives NaN, one whose absmax is below 2^-112 gives zeros.
//         y = xs[m] * sum_b (scale[n, g] * P + (offset[n, g] + c * scale[n, g]) * S)
//   where P = sum_{k in b} xq * (q - c),  S = sum_{k in b} xq
//   32  x as float32; products and sums in float32.
//
// The kernels of a GPU take 16 bits as a float of 16 bits, which tensor cores multiply: their own
// dtype of x, or what their file says of float32.
//
// 8 and 16: P and S are exact in int32; the sum over b is float32; without offset the second term
// is 0. Weights stay exact. Rounding x to 16 bits moves a row by at most sqrt(K) * 2^-16 of its
// length, ten times less in rows without outliers: closer than float16 or bfloat16 would be, for
// the price of bfloat16: two products of bytes, xq = 256 * h + l with signed h and l (hence 32639 =
// 127 * 257).
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
constexpr int kGroupedWide = 64;     // rows of W per call of the kernel for many rows of x
constexpr int kGroupedWideRows = 4;  // its rows of x

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
// 4-bit weights times integers: the even k of each 8 come before the odd ones, as the low and the
// high nibbles of a dword need them.
struct GroupedTile {
  int8_t* xq;      // activation_bits 8: [k / 4][ld][4]; 16: the upper bytes
  int8_t* xl;      // activation_bits 16: the lower bytes, likewise
  float* x;        // activation_bits 32: [k][ld]
  float* xs;       // activation_bits 8: [k / block][ld]; 16: [ld]
  float* xsum;     // [k / block][ld]: sum of x, of xq (16), or xs * sum of xq (8)
  int32_t* start;  // activation_bits 8, 16: [k / block][ld], -centre * sum of xq: where integer
                   // sums start
  int ld;
};

// kGroupedWide rows of W for many rows of x: bytes, and scales as float32.
struct GroupedWide {
  const uint8_t* codes;  // panel v at v * stride: [k / 4][16][4], in the order of xq
  int64_t stride;
  const float* scales;  // [k / block][2][64]: scale, and offset with the centre of the codes
};

// Writes row r of the tile.
using GroupedPrepareFn = void (*)(const GroupedLayout& layout, const void* x, DType dtype, int r,
                                  const GroupedTile& tile);
// One panel times a tile: acc[r * ld + j] = the sum over k, j < 16.
using GroupedPanelFn = void (*)(const GroupedLayout& layout, const uint8_t* panel,
                                const GroupedTile& tile, float* acc, int64_t ld);
// `rows` <= kGroupedWideRows successive tiles of one row, row_bytes apart: acc [rows][64].
using GroupedWideFn = void (*)(const GroupedLayout& layout, const GroupedWide& weights,
                               const GroupedTile& first, int64_t row_bytes, int rows, float* acc);
// Makes the wide form of `count` <= 4 panels in `memory`: codes [4][k * 16], then the scales. Four
// panels of 8-bit codes stay where they lie.
using GroupedWidenFn = GroupedWide (*)(const GroupedLayout& layout, const uint8_t* panels,
                                       int64_t count, uint8_t* memory);
// Interleaves `dwords` dwords of each of 16 rows, row_bytes apart, and flips bits.
using GroupedPackFn = void (*)(const uint8_t* rows, int64_t row_bytes, int64_t dwords,
                               uint32_t flip, uint8_t* out);

// The epilogue of columns n .. n + count - 1 of row m, whose sums are acc[0 .. count - 1].
using GroupedFinishFn = void (*)(const Epilogue& epilogue, const float* acc, int64_t m, int64_t n,
                                 int64_t count);

struct GroupedKernels {
  GroupedPanelFn panel8, panel16, panel32;  // by activation_bits
  GroupedPrepareFn prepare8, prepare16, prepare32;
  GroupedWideFn wide8, wide16;  // nullptr: panels only
  GroupedWidenFn widen;
  GroupedPackFn pack;
  GroupedFinishFn finish;
};

#define KERNEL(name, isa) extern const GroupedKernels linear_grouped_##name;
#include "linear_grouped/linear_grouped.inc"
#undef KERNEL

}  // namespace narrowcast
