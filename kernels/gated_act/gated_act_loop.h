// The loop of the room, compiled once per instruction set.
#pragma once
#include "common/lanes.h"
#include "gated_act/gated_act.h"

namespace narrowcast {
namespace {

template <DType T, DType Y, Activation A>
void gated_act(const void* gate, const void* up, void* y, int64_t count) {
  using V = Lanes;
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth)
    V::store(y, i, Y, V::mul(V::act(A, V::load(gate, i, T)), V::load(up, i, T)));
  const int64_t left = count - i;
  if (left)
    V::store(y, i, Y, V::mul(V::act(A, V::load(gate, i, T, left)), V::load(up, i, T, left)), left);
}

template <DType T, DType Y>
void gated_act(const void* gate, const void* up, void* y, int64_t count, Activation activation) {
  if (activation == Activation::kSilu)
    return gated_act<T, Y, Activation::kSilu>(gate, up, y, count);
  if (activation == Activation::kGelu)
    return gated_act<T, Y, Activation::kGelu>(gate, up, y, count);
  gated_act<T, Y, Activation::kGeluTanh>(gate, up, y, count);
}

// y is of the dtype of gate, or float32 on its way to the quantiser.
template <DType T>
void gated_act(const void* gate, const void* up, void* y, DType y_dtype, int64_t count,
               Activation activation) {
  if (y_dtype == T) return gated_act<T, T>(gate, up, y, count, activation);
  gated_act<T, DType::kFloat32>(gate, up, y, count, activation);
}

}  // namespace
}  // namespace narrowcast

#define NC_GATED_ACT_KERNEL(variant)                                                              \
  namespace narrowcast {                                                                          \
  void gated_act_##variant(const void* gate, const void* up, DType dtype, void* y, DType y_dtype, \
                           int64_t count, Activation activation) {                                \
    if (dtype == DType::kFloat32)                                                                 \
      return gated_act<DType::kFloat32>(gate, up, y, y_dtype, count, activation);                 \
    if (dtype == DType::kFloat16)                                                                 \
      return gated_act<DType::kFloat16>(gate, up, y, y_dtype, count, activation);                 \
    gated_act<DType::kBFloat16>(gate, up, y, y_dtype, count, activation);                         \
  }                                                                                               \
  }
