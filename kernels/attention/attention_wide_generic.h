// The vector type that attention_tile.h asks for, for files compiled for generic.
#pragma once
#include "attention/attention_tile.h"

namespace narrowcast {
namespace {

// Four floats that the compiler keeps in whatever vector registers the machine has.
struct Wide {
  struct T {
    float x[4];
  };
  static constexpr bool kPairs = false;  // v as float32, not as pairs of bfloat16
  static constexpr int64_t kWidth = 4, kColumns = 2;
  template <class F>
  static T each(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static T set(float x) { return {{x, x, x, x}}; }
  static T load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void store(float* p, T a) { memcpy(p, a.x, sizeof a.x); }
  static T fma(T a, T b, T c) {
    return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static T mul(T a, T b) {
    return each([&](int i) { return a.x[i] * b.x[i]; });
  }
  static T add(T a, T b) {
    return each([&](int i) { return a.x[i] + b.x[i]; });
  }
  static T sub(T a, T b) {
    return each([&](int i) { return a.x[i] - b.x[i]; });
  }
  static T max(T a, T b) {
    return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static T exp(T a) {
    return each([&](int i) { return expf(a.x[i]); });
  }
  static T tanh(T a) {
    return each([&](int i) { return tanhf(a.x[i]); });
  }
  static T finite_or_zero(T a) {
    return each([&](int i) { return a.x[i] == -INFINITY ? 0.0f : a.x[i]; });
  }
  static T outside(int32_t key, const int32_t* first, const int32_t* last, T a, float none) {
    return each([&](int i) { return first[i] <= key && key < last[i] ? a.x[i] : none; });
  }
  static float element(const char* p, int64_t i, DType dtype) {
    float x;
    uint16_t h;
    if (dtype == DType::kInt8) return static_cast<signed char>(p[i]);
    if (dtype == DType::kFloat32) return memcpy(&x, p + 4 * i, sizeof x), x;
    memcpy(&h, p + 2 * i, sizeof h);
    return dtype == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
  }
  static T widen(const char* p, int64_t i, DType dtype) {
    return each([&](int n) { return element(p, i + n, dtype); });
  }
  static T widen_tail(const char* p, int64_t i, DType dtype, int64_t count) {
    return each([&](int n) { return n < count ? element(p, i + n, dtype) : 0.0f; });
  }
  // Elements of 4 bits: byte i at p, shifted.
  static T nibbles(const char* p, int shift) {
    return each(
        [&](int i) { return static_cast<float>(static_cast<unsigned char>(p[i]) >> shift & 15); });
  }
  // Lane i of the result: the sum of the 4 floats at p + 4 i.
  static T reduce(const float* p) {
    return each([&](int i) { return p[4 * i] + p[4 * i + 1] + (p[4 * i + 2] + p[4 * i + 3]); });
  }
  static void load_row(const char* p, DType dtype, float scale, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = element(p, i, dtype) * scale;
  }
  static void store_row(const float* x, float factor, int64_t count, char* to, DType dtype) {
    for (int64_t i = 0; i < count; ++i) {
      const float y = x[i] * factor;
      const uint16_t h = dtype == DType::kFloat16 ? to_float16(y) : to_bfloat16(y);
      if (dtype == DType::kFloat32)
        memcpy(to + 4 * i, &y, sizeof y);
      else
        memcpy(to + 2 * i, &h, sizeof h);
    }
  }
};

}  // namespace
}  // namespace narrowcast
