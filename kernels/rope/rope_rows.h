// The loops of the room, compiled once per instruction set.
#pragma once
#include "common/lanes.h"
#include "rope/rope.h"

namespace narrowcast {
namespace {

template <DType T, DType C>
void rope_halves(const void* x, void* out, const void* cos, const void* sin, int64_t half) {
  using V = Lanes;
  const V::T minus = V::set(-1.0f);
  over_lanes(half, [&](int64_t i, int64_t left) {
    const V::T a = V::load(x, i, T, left), b = V::load(x, half + i, T, left);
    const V::T c = V::load(cos, i, C, left), s = V::load(sin, i, C, left);
    V::store(out, i, T, V::fma(V::mul(b, minus), s, V::mul(a, c)), left);
    V::store(out, half + i, T, V::fma(a, s, V::mul(b, c)), left);
  });
}

// Through floats on the stack: pairs are split and joined by plain loops, which the compiler turns
// into shuffles.
template <DType T, DType C>
void rope_pairs(const void* x, void* out, const void* cos, const void* sin, int64_t half) {
  using V = Lanes;
  constexpr int64_t kPairs = 32;
  float xs[2 * kPairs], ys[2 * kPairs], c[kPairs], s[kPairs];
  for (int64_t i = 0; i < half; i += kPairs) {
    const int64_t count = half - i < kPairs ? half - i : kPairs;
    over_lanes(2 * count, [&](int64_t j, int64_t left) {
      V::store(xs, j, DType::kFloat32, V::load(x, 2 * i + j, T, left), left);
    });
    over_lanes(count, [&](int64_t j, int64_t left) {
      V::store(c, j, DType::kFloat32, V::load(cos, i + j, C, left), left);
      V::store(s, j, DType::kFloat32, V::load(sin, i + j, C, left), left);
    });
    for (int64_t j = 0; j < count; ++j) {
      const float a = xs[2 * j], b = xs[2 * j + 1];
      ys[2 * j] = a * c[j] - b * s[j];
      ys[2 * j + 1] = b * c[j] + a * s[j];
    }
    over_lanes(2 * count, [&](int64_t j, int64_t left) {
      V::store(out, 2 * i + j, T, V::load(ys, j, DType::kFloat32, left), left);
    });
  }
}

template <DType T, DType C>
void rope_row(const void* x, void* out, const void* cos, const void* sin, int64_t half,
              int64_t depth, bool interleaved) {
  interleaved ? rope_pairs<T, C>(x, out, cos, sin, half)
              : rope_halves<T, C>(x, out, cos, sin, half);
  constexpr int64_t size = T == DType::kFloat32 ? 4 : 2;
  const int64_t turned = 2 * half * size, all = depth * size;
  if (turned < all)
    __builtin_memcpy(static_cast<char*>(out) + turned, static_cast<const char*>(x) + turned,
                     static_cast<size_t>(all - turned));
}

template <DType T>
void rope_row(const void* x, void* out, const void* cos, const void* sin, DType table, int64_t half,
              int64_t depth, bool interleaved) {
  if (table == DType::kFloat32)
    return rope_row<T, DType::kFloat32>(x, out, cos, sin, half, depth, interleaved);
  if (table == DType::kFloat16)
    return rope_row<T, DType::kFloat16>(x, out, cos, sin, half, depth, interleaved);
  rope_row<T, DType::kBFloat16>(x, out, cos, sin, half, depth, interleaved);
}

}  // namespace
}  // namespace narrowcast

#define NC_ROPE_KERNEL(variant)                                                                \
  namespace narrowcast {                                                                       \
  void rope_##variant(const void* x, void* out, DType dtype, const void* cos, const void* sin, \
                      DType table, int64_t half, int64_t depth, bool interleaved) {            \
    if (dtype == DType::kFloat32)                                                              \
      return rope_row<DType::kFloat32>(x, out, cos, sin, table, half, depth, interleaved);     \
    if (dtype == DType::kFloat16)                                                              \
      return rope_row<DType::kFloat16>(x, out, cos, sin, table, half, depth, interleaved);     \
    rope_row<DType::kBFloat16>(x, out, cos, sin, table, half, depth, interleaved);             \
  }                                                                                            \
  }
