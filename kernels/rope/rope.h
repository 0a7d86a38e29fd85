// Rotary position embedding: pairs of x turned by the angle of their position.
//
//   (a, b) -> (a * cos[p, i] - b * sin[p, i], b * cos[p, i] + a * sin[p, i]),   i = 0 .. R / 2 - 1
//   half-split: a = x[i], b = x[i + R / 2];  interleaved: a = x[2 i], b = x[2 i + 1]
//   x[R ..] passes through.
//
// p of x[b, h, s] is s, or positions[b] + s, or positions[b, s].
// Numerics: products and sums in float32, rounded once when stored.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace narrowcast {

struct RopeArgs {
  const void* x;  // [batch, heads, length, depth], the last dimension adjacent
  void* out;      // the same, contiguous
  int64_t batch, heads, length, depth;
  int64_t stride_batch, stride_head, stride_length;
  const void *cos, *sin;                      // [table_rows, half] contiguous
  const void* positions;                      // nullptr, or int32 / int64
  int64_t table_rows, half;                   // half = R / 2
  int64_t positions_batch, positions_length;  // strides; with one position per sequence the second
  bool explicit_positions;                    // is not used
  bool interleaved;
  DType dtype, table_dtype, positions_dtype;
};

// Throws when a position lies outside the tables.
void rope_run(const RopeArgs& args);

// One vector x [depth] -> out [depth]; cos and sin [half] of its position.
using RopeFn = void (*)(const void* x, void* out, DType dtype, const void* cos, const void* sin,
                        DType table_dtype, int64_t half, int64_t depth, bool interleaved);
#define KERNEL(name, isa)                                                                   \
  void rope_##name(const void* x, void* out, DType dtype, const void* cos, const void* sin, \
                   DType table_dtype, int64_t half, int64_t depth, bool interleaved);
#include "rope/rope.inc"
#undef KERNEL

}  // namespace narrowcast
