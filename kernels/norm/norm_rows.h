// The loops of the room, compiled once per instruction set. Three passes over a row that the first
// one leaves in the L1 cache.
#pragma once
#include "common/lanes.h"
#include "norm/norm.h"

namespace narrowcast {
namespace {

// Several sums at once hide the latency of the addition, and many short ones round less than one
// long one, which the scalar kernel needs.
constexpr int kSums = Lanes::kWidth == 1 ? 16 : 4;
template <class Term>
[[gnu::always_inline]] inline float sum_over(int64_t count, Term&& term) {
  using V = Lanes;
  V::T s[kSums];
  for (V::T& one : s) one = V::set(0);
  int64_t i = 0;
  for (; i + kSums * V::kWidth <= count; i += kSums * V::kWidth)
    for (int j = 0; j < kSums; ++j) s[j] = term(s[j], i + j * V::kWidth, V::kWidth);
  for (; i + V::kWidth <= count; i += V::kWidth) s[0] = term(s[0], i, V::kWidth);
  if (i < count) s[1] = term(s[1], i, count - i);
  for (int half = kSums / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) s[j] = V::add(s[j], s[j + half]);
  return V::sum(s[0]);
}

template <DType T>
[[gnu::always_inline]] inline typename Lanes::T at(const void* p, int64_t i, int64_t left) {
  return left == Lanes::kWidth ? Lanes::load(p, i, T) : Lanes::load(p, i, T, left);
}
template <DType T>
[[gnu::always_inline]] inline void put(void* p, int64_t i, typename Lanes::T v, int64_t left) {
  left == Lanes::kWidth ? Lanes::store(p, i, T, v) : Lanes::store(p, i, T, v, left);
}

template <DType T, DType P>
void norm_row(const NormArgs& a, int64_t row, float* work) {
  using V = Lanes;
  constexpr DType F = DType::kFloat32;
  constexpr int64_t size = T == F ? 4 : 2;
  const int64_t n = a.columns;
  const char* x = static_cast<const char*>(a.x) + row * a.ld_x * size;
  const char* residual =
      a.residual ? static_cast<const char*>(a.residual) + row * a.ld_residual * size : nullptr;
  char* sum = a.sum ? static_cast<char*>(a.sum) + row * n * size : nullptr;
  char* y = a.y ? static_cast<char*>(a.y) + row * n * size : nullptr;

  // First pass: the row in float32, its sum (layer) or sum of squares (rms).
  const bool rms = a.rms;
  const auto tally = [rms](V::T s, V::T v) { return rms ? V::fma(v, v, s) : V::add(s, v); };
  const float* s = work;
  float total;
  if (residual) {
    total = sum_over(n, [&](V::T t, int64_t i, int64_t left) {
      const V::T v = V::add(at<T>(x, i, left), at<T>(residual, i, left));
      put<F>(work, i, v, left);
      if (sum) put<T>(sum, i, v, left);
      return tally(t, v);
    });
  } else if constexpr (T == F) {
    s = reinterpret_cast<const float*>(x);
    total =
        sum_over(n, [&](V::T t, int64_t i, int64_t left) { return tally(t, at<F>(x, i, left)); });
  } else {
    total = sum_over(n, [&](V::T t, int64_t i, int64_t left) {
      const V::T v = at<T>(x, i, left);
      put<F>(work, i, v, left);
      return tally(t, v);
    });
  }

  float mean = 0.0f, square = total;
  if (!rms) {
    mean = total / static_cast<float>(n);
    const V::T m = V::set(mean);
    square = sum_over(n, [&](V::T t, int64_t i, int64_t left) {
      const V::T d = V::first(V::sub(at<F>(s, i, left), m), left);
      return V::fma(d, d, t);
    });
  }
  // 1 / inf would turn what is finite in such a row into zeros that look like results.
  const float factor = __builtin_isfinite(square)
                           ? 1.0f / sqrtf(square / static_cast<float>(n) + a.eps)
                           : __builtin_nanf("");

  const V::T m = V::set(mean), f = V::set(factor);
  const auto last = [&](auto&& parameters) {
    over_lanes(n, [&](int64_t i, int64_t left) {
      V::T v = at<F>(s, i, left);
      if (!rms) v = V::sub(v, m);
      v = parameters(V::mul(v, f), i, left);
      if (y) put<T>(y, i, v, left);
      if (a.q) put<F>(work, i, v, left);
    });
  };
  if (a.weight && a.bias)
    last([&](V::T v, int64_t i, int64_t left) {
      return V::fma(v, at<P>(a.weight, i, left), at<P>(a.bias, i, left));
    });
  else if (a.weight)
    last([&](V::T v, int64_t i, int64_t left) { return V::mul(v, at<P>(a.weight, i, left)); });
  else if (a.bias)
    last([&](V::T v, int64_t i, int64_t left) { return V::add(v, at<P>(a.bias, i, left)); });
  else
    last([](V::T v, int64_t, int64_t) { return v; });
}

template <DType T>
void norm_row(const NormArgs& a, int64_t row, float* work) {
  if (a.parameter_dtype == DType::kFloat32) return norm_row<T, DType::kFloat32>(a, row, work);
  if (a.parameter_dtype == DType::kFloat16) return norm_row<T, DType::kFloat16>(a, row, work);
  norm_row<T, DType::kBFloat16>(a, row, work);
}

}  // namespace
}  // namespace narrowcast

#define NC_NORM_KERNEL(variant)                                                     \
  namespace narrowcast {                                                            \
  void norm_row_##variant(const NormArgs& a, int64_t row, float* work) {            \
    if (a.dtype == DType::kFloat32) return norm_row<DType::kFloat32>(a, row, work); \
    if (a.dtype == DType::kFloat16) return norm_row<DType::kFloat16>(a, row, work); \
    norm_row<DType::kBFloat16>(a, row, work);                                       \
  }                                                                                 \
  }
