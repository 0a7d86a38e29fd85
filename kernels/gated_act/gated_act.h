// Gated activations: y = activation(gate) * up, alone or quantised.
//
//   silu_mul: activation silu; gelu_mul: gelu, or gelu_tanh (approximate="tanh")
//   q, scale = quantize_int8(y) per row or per group of a row (quantize.h)
//
// gate and up are read where they lie, so both may be halves of one merged tensor.
// Numerics: float32 from load to store, one rounding of y; q is taken from the float32 y.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/tensor_view.h"

namespace narrowcast {

struct GatedActArgs {
  const void* gate;  // [rows, columns], ld_gate elements apart
  const void* up;    // the same with ld_up
  void* y;           // [rows, columns] contiguous, or nullptr
  int8_t* q;         // the same, or nullptr
  float* scale;      // [rows, columns / group] when q
  int64_t rows, columns, ld_gate, ld_up, group;
  Activation activation;
  DType dtype;
};

void gated_act_run(const GatedActArgs& args);

// y[i] = activation(gate[i]) * up[i]; gate and up of dtype, y of y_dtype.
using GatedActFn = void (*)(const void* gate, const void* up, DType dtype, void* y, DType y_dtype,
                            int64_t count, Activation activation);
#define KERNEL(name, isa)                                                                      \
  void gated_act_##name(const void* gate, const void* up, DType dtype, void* y, DType y_dtype, \
                        int64_t count, Activation activation);
#include "gated_act/gated_act.inc"
#undef KERNEL

}  // namespace narrowcast
