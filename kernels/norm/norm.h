// Norms over the last dimension, alone or with the residual sum before and the quantiser behind.
//
//   s = x, or x + residual
//   rms:    y = s / sqrt(mean(s^2) + eps) * weight
//   layer:  y = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) * weight + bias
//   q, scale = quantize_int8(y) per row or per group of a row (quantize.h)
//
// Numerics: everything from the load of x to the store of y in float32, the variance from the
// centred values. y and s are each rounded once, when stored; q is taken from the float32 y.
// NaN or infinity in a row makes that row NaN, and so does a sum of squares beyond float32.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace narrowcast {

struct NormArgs {
  const void* x;         // [rows, columns], ld_x elements apart
  const void* residual;  // the same with ld_residual, or nullptr
  const void* weight;    // [columns], or nullptr for 1
  const void* bias;      // [columns], or nullptr for 0
  void* y;               // [rows, columns] contiguous, or nullptr
  void* sum;             // the same, or nullptr
  int8_t* q;             // the same, or nullptr
  float* scale;          // [rows, columns / group] when q
  int64_t rows, columns, ld_x, ld_residual, group;
  float eps;
  bool rms;
  DType dtype, parameter_dtype;  // of x, residual, y, sum; of weight, bias
};

void norm_run(const NormArgs& args);

// One row. work [columns] holds the row in float32 between the passes, and y in float32 at the end
// when args.q.
using NormRowFn = void (*)(const NormArgs& args, int64_t row, float* work);
#define KERNEL(name, isa) void norm_row_##name(const NormArgs& args, int64_t row, float* work);
#include "norm/norm.inc"
#undef KERNEL

}  // namespace narrowcast
