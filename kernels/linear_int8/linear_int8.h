// linear_int8: y[m, n] = epilogue(acc * scales), acc[m, n] = sum_k (x[m, k] - x_zero_point[m]) *
// w[n, k].
//
//   x             int8 [M, K], rows ldx apart.
//   x_scale       float32: one for all, or [M], or [M, K / group] when group > 0.
//   x_zero_point  int32 [M], or null: 0. Only with group = 0.
//   w             int8 [N, K], rows ldw apart, or packed: see LinearInt8Kernel.
//   w_scale       float32: one for all, or [N].
//   epilogue      bias, activations, residual, output: common/epilogue.h.
//
// Numerics. acc is exact in int32. Order, products and sums rounded one by one:
//   group = 0:  v = (float(acc) * x_scale[m]) * w_scale[n]
//   group > 0:  v = (sum over g, in order, of float(acc_g) * x_scale[m, g]) * w_scale[n], fused
//   where the CPU can K > 65536:  float(acc) becomes the float32 sum of exact pieces of 65536
//   columns; the zero point enters
//               as float(x_zero_point) * float(sum of w).
#pragma once
#include <cstdint>

#include "common/epilogue.h"

namespace narrowcast {

constexpr int64_t kLinearInt8Exact = 65536;  // columns whose products always fit an int32

struct LinearInt8Kernel;

struct LinearInt8Args {
  const int8_t* x = nullptr;
  const float* x_scale = nullptr;
  const int32_t* x_zero_point = nullptr;
  const int8_t* w = nullptr;        // nullptr when packed is set
  const uint8_t* packed = nullptr;  // made by `kernel`
  const float* w_scale = nullptr;
  Epilogue epilogue;
  int64_t rows = 0, columns = 0, depth = 0, group = 0;
  int64_t ldx = 0, ldw = 0;
  int64_t x_scale_stride = 0, w_scale_stride = 0;  // 0: one scale for all
  const LinearInt8Kernel* kernel = nullptr;        // nullptr: selected by the run
  void* scratch = nullptr;                         // linear_int8_scratch() bytes, 64-byte aligned
  // Set by the run.
  const int32_t* start = nullptr;  // accumulators start here, [M, pieces]; nullptr: at 0
  int64_t piece = 0, pieces = 0;   // the group, or the exact piece of K
};

// One CPU kernel. Columns are packed in panels of kLinearInt8Panel, each `panel_bytes(K)` long.
constexpr int64_t kLinearInt8Panel = 64;
struct LinearInt8Kernel {
  const char* layout;  // kernels with equal names share packed weights
  int depth_step;      // rows of x are read up to the next multiple of it
  int64_t (*panel_bytes)(int64_t depth);
  void (*pack)(const int8_t* w, int64_t ldw, int columns, int64_t depth, uint8_t* panel);
  // Rows [m0, m1) x one packed panel that begins at column n0.
  void (*block)(const LinearInt8Args& args, const uint8_t* panel, int64_t m0, int64_t m1,
                int64_t n0, int columns);
  // What `start` of `rows` rows is; nullptr when the kernel starts at 0.
  void (*row_starts)(const int8_t* x, int64_t ldx, int64_t rows, int64_t depth, int64_t piece,
                     int32_t* start);
  // Canonical weights, up to `direct_rows` rows of x, columns [n0, n1), pieces = 1, no zero point.
  void (*direct)(const LinearInt8Args& args, int64_t n0, int64_t n1);
  int direct_rows;
};

const LinearInt8Kernel& linear_int8_kernel();  // the one selected now
int64_t linear_int8_scratch(int64_t rows, int64_t depth, int64_t group);
int64_t linear_int8_packed_bytes(const LinearInt8Kernel& kernel, int64_t columns, int64_t depth);
void linear_int8_pack(const LinearInt8Kernel& kernel, const int8_t* w, int64_t ldw, int64_t columns,
                      int64_t depth, uint8_t* packed);
void linear_int8_run(LinearInt8Args args);

// linear_dynamic_int8: rows of x (float32, float16, bfloat16) are quantised into scratch, then as
// above. Returns whether x held a NaN or an infinity.
struct LinearDynamicInt8Args {
  const void* x = nullptr;
  DType x_dtype = DType::kFloat32;
  int64_t ldx = 0;
  bool asymmetric = false, strict = false;
  LinearInt8Args linear;  // x, x_scale, x_zero_point, ldx are set by the run
};
int64_t linear_dynamic_int8_scratch(int64_t rows, int64_t depth, int64_t group);
void linear_dynamic_int8_run(LinearDynamicInt8Args args);

#define KERNEL(name, isa) extern const LinearInt8Kernel linear_int8_##name;
#include "linear_int8/linear_int8.inc"
#undef KERNEL

}  // namespace narrowcast
