// Attention in float64 over AttentionArgs in host memory, and inputs for its tests.
#pragma once
#include <cmath>
#include <vector>

#include "attention/attention.h"
#include "check.h"
#include "common/epilogue.h"

namespace truth {

using namespace narrowcast;

// `deviation`: of the values around 0, in steps of a 1000th.
inline std::vector<uint16_t> halves(DType dtype, int64_t count, float deviation = 1.0f) {
  std::vector<uint16_t> v(count);
  for (int64_t i = 0; i < count; ++i)
    store_float(v.data(), i, dtype,
                (static_cast<int>(emulator::random_number() % 2001) - 1000) * 2e-3f * deviation);
  return v;
}

inline double value(const void* p, int64_t i, DType dtype) {
  return dtype == DType::kInt8 ? static_cast<const int8_t*>(p)[i] : load_float(p, i, dtype);
}

// One row of out in float64, and its lse.
inline std::vector<double> row(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, int64_t q0,
                               int64_t k0, int64_t sq, int64_t sk, double* lse) {
  const int64_t kv_head = h / (a.heads / a.kv_heads), position = i + sk - sq;
  const auto place = [&](int64_t j, const AttentionStrides& s) {
    const int64_t outer = a.block_table ? a.block_table[b * a.table_stride + j / a.page_size] : b;
    return outer * s.batch + kv_head * s.head + (a.block_table ? j % a.page_size : k0 + j) * s.row;
  };
  const int64_t q = b * a.q_strides.batch + h * a.q_strides.head + (q0 + i) * a.q_strides.row;
  std::vector<double> scores(sk, -INFINITY), out(a.v_depth);
  double top = a.sinks ? a.sinks[h] : -INFINITY;
  for (int64_t j = 0; j < sk; ++j) {
    if (a.causal && j > position) continue;
    if (a.window && (j <= position - a.window || (!a.causal && j >= position + a.window))) continue;
    double s = 0.0;
    for (int64_t d = 0; d < a.depth; ++d)
      s += value(a.q, q + d, a.q_dtype) * value(a.k, place(j, a.k_strides) + d, a.kv_dtype);
    s *= a.scale;
    if (a.k_scale) s *= a.k_scale[place(j, a.k_scale_strides)];
    if (a.softcap > 0) s = a.softcap * std::tanh(s / a.softcap);
    if (a.bias)
      s += load_float(a.bias,
                      b * a.bias_strides[0] + h * a.bias_strides[1] + i * a.bias_strides[2] +
                          j * a.bias_strides[3],
                      a.bias_dtype);
    scores[j] = s, top = s > top || s != s ? s : top;  // NaN stays
  }
  *lse = -INFINITY;
  if (top == -INFINITY) return out;
  double total = a.sinks ? std::exp(a.sinks[h] - top) : 0.0;
  for (const double s : scores) total += std::exp(s - top);
  for (int64_t j = 0; j < sk; ++j) {
    const double p = std::exp(scores[j] - top) / total;
    const double scale = a.v_scale ? a.v_scale[place(j, a.v_scale_strides)] : 1.0;
    for (int64_t d = 0; p > 0 && d < a.v_depth; ++d)
      out[d] += p * scale * value(a.v, place(j, a.v_strides) + d, a.kv_dtype);
  }
  *lse = top + std::log(total);
  return out;
}

// Row `at` elements into out against the truth: the error of a row relative to the values weighed.
inline void compare(const AttentionArgs& a, int64_t at, const std::vector<double>& want) {
  const uint16_t* out = static_cast<const uint16_t*>(a.out) + at;
  const double unit = a.q_dtype == DType::kFloat16 ? 1e-3 : 8e-3;
  for (int64_t d = 0; d < a.v_depth; ++d) {
    check::require(emulator::is_written(out + d), "an output was not written");
    const double got = load_float(out, d, a.out_dtype);
    check::require(std::abs(got - want[d]) <= unit * (std::abs(want[d]) + 0.5),
                   "column " + std::to_string(d) + ": " + std::to_string(got) + " instead of " +
                       std::to_string(want[d]));
  }
}

}  // namespace truth
