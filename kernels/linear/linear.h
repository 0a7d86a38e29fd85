// linear: y[m, n] = epilogue(sum_k x[m, k] * w[n, k]), accumulated in float32.
//
//   x         float32, float16 or bfloat16 [M, K], rows ldx apart.
//   w         [N, K] of the same dtype, rows ldw apart, or packed: see LinearFormat.
//   epilogue  bias, activations, residual, output: common/epilogue.h.
//
// Numerics: fused multiply-adds in float32 where the CPU has them, in the order of k; products of
// bfloat16 may be added in pairs (vdpbf16ps, which also takes subnormals as zero).
#pragma once
#include <cstdint>

#include "common/epilogue.h"

namespace narrowcast {

struct LinearKernel;

struct LinearArgs {
  const void* x = nullptr;
  const void* w = nullptr;       // nullptr when packed is set
  const void* packed = nullptr;  // made by `kernel`
  Epilogue epilogue;
  DType dtype = DType::kFloat32;  // of x and w
  int64_t rows = 0, columns = 0, depth = 0;
  int64_t ldx = 0, ldw = 0;
  const LinearKernel* kernel = nullptr;  // nullptr: selected by the run
  void* scratch = nullptr;               // linear_scratch() bytes, 64-byte aligned
};

// One dtype of weights in one kernel. Columns are packed in panels of kLinearPanel.
constexpr int64_t kLinearPanel = 64;
constexpr int64_t kLinearBlock = 96;  // most rows per call of `block`
struct LinearFormat {
  const char* layout;     // formats with equal names share packed weights
  DType x_dtype;          // what `block` reads x as
  int depth_step;         // x is read, and a panel is padded, up to the next multiple of it
  int64_t element_bytes;  // of the panel: [padded K][64]
  void (*pack)(const void* w, int64_t ldw, int columns, int64_t depth, void* panel);
  // Rows [m0, m1) x one packed panel that begins at column n0.
  void (*block)(const LinearArgs& args, const void* panel, int64_t m0, int64_t m1, int64_t n0,
                int columns);
  // Weights where they lie, up to kLinearDirectRows rows, columns [n0, n1); nullptr: pack on the
  // way.
  void (*direct)(const LinearArgs& args, int64_t n0, int64_t n1);
};
constexpr int64_t kLinearDirectRows = 4;

struct LinearKernel {
  const LinearFormat *float32, *float16, *bfloat16;
};

const LinearKernel& linear_kernel();  // the one selected now
const LinearFormat& linear_format(const LinearKernel& kernel, DType dtype);
int64_t linear_scratch(int64_t rows, int64_t depth);
int64_t linear_packed_bytes(const LinearFormat& format, int64_t columns, int64_t depth);
void linear_pack(const LinearFormat& format, const void* w, DType dtype, int64_t ldw,
                 int64_t columns, int64_t depth, void* packed);
void linear_run(LinearArgs args);

#define KERNEL(name, isa) extern const LinearKernel linear_##name;
#include "linear/linear.inc"
#undef KERNEL
// Shared by the kernels that lack a form of their own.
extern const LinearFormat linear_float32_avx512, linear_float16_avx512;

}  // namespace narrowcast
