// Rows to int8, and values to int8 or uint8 by a given scale.
//
// Symmetric, per row or per group of a row:
//   scale = max |x| / 127, over finite x;  q = saturate(round_half_even(x * (1 / scale)), -127,
//   127)
// Asymmetric, per row:
//   low = min(0, min x), high = max(0, max x);  scale = (high - low) / 255
//   zero_point = round_half_even(-128 - low * (1 / scale));  q = saturate(round_half_even(x * (1 /
//   scale)) + zero_point, -128, 127)
// Static:
//   q = saturate(round_half_even(x * (1 / scale)) + zero_point) to [-127, 127] or [0, 255]
//
// A scale below the smallest normal float32 (a row of zeros, or of values under 1.5e-36) becomes 1.
// Inf saturates, NaN becomes the zero point and is counted. Divisions are exact, products are not
// fused: the same bits from every backend.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace narrowcast {

// What a row held beside finite numbers.
struct QuantizeFindings {
  int64_t nan = 0;
  bool finite = true;
};

// x [count] of float32, float16 or bfloat16 -> q [count], one scale, one zero point (when
// asymmetric).
using QuantizeRowFn = void (*)(const void* x, DType dtype, int64_t count, bool asymmetric,
                               int8_t* q, float* scale, int32_t* zero_point,
                               QuantizeFindings* findings);
// The static form; is_signed: int8, else uint8.
using QuantizeStaticFn = void (*)(const void* x, DType dtype, int64_t count, float inverse_scale,
                                  int32_t zero_point, bool is_signed, void* q,
                                  QuantizeFindings* findings);

// The symmetric form for neighbouring groups of 32 or 64 float32 values of one row, a scale each.
using QuantizeSmallGroupsFn = void (*)(const float* x, int64_t size, int64_t groups, int8_t* q,
                                       float* scale, QuantizeFindings* findings);

struct QuantizeKernel {
  QuantizeRowFn row;
  QuantizeStaticFn by_scale;
  QuantizeSmallGroupsFn small_groups = nullptr;  // nullptr: row() for each of them
};

#define KERNEL(name, isa) extern const QuantizeKernel quantize_##name;
#include "quantize/quantize.inc"
#undef KERNEL

const QuantizeKernel& quantize_kernel();  // the one selected now; for rooms that quantise inside

// A row of `groups` groups; zero_point: one, of an asymmetric row (which is one group), or nullptr.
inline void quantize_row(const QuantizeKernel& kernel, const void* x, DType dtype, int64_t group,
                         int64_t groups, int8_t* q, float* scale, int32_t* zero_point,
                         QuantizeFindings* findings) {
  if (kernel.small_groups && (group == 32 || group == 64) && dtype == DType::kFloat32 &&
      !zero_point)
    return kernel.small_groups(static_cast<const float*>(x), group, groups, q, scale, findings);
  const int64_t step = dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t g = 0; g < groups; ++g)
    kernel.row(static_cast<const char*>(x) + g * group * step, dtype, group, zero_point != nullptr,
               q + g * group, scale + g, zero_point, findings);
}

struct QuantizeRowsArgs {
  const void* x;                       // [rows, columns], ld_x elements apart
  int8_t* q;                           // [rows, columns] contiguous
  float* scale;                        // [rows, columns / group]
  int32_t* zero_point;                 // [rows] when asymmetric, else nullptr
  int64_t rows, columns, ld_x, group;  // group == columns: one scale a row
  DType dtype;
};
// Adds NaNs to nan_count(). Returns whether all of x was finite.
bool quantize_rows_run(const QuantizeRowsArgs& args);

struct QuantizeStaticArgs {
  const void* x;
  void* q;
  int64_t count;
  float scale;
  int32_t zero_point;
  DType dtype;
  bool is_signed;
};
bool quantize_static_run(const QuantizeStaticArgs& args);

// NaNs met by every quantiser of the process since the last reset.
int64_t nan_count(bool reset);
void count_nan(int64_t found);

}  // namespace narrowcast
