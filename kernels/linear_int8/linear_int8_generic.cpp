#include "linear_int8/linear_int8.h"

namespace narrowcast {
namespace {

// A panel is its rows of w, one after another, then the sum of each.
int64_t panel_bytes(int64_t depth) {
  return (kLinearInt8Panel * depth + 63) / 64 * 64 + kLinearInt8Panel * 4;
}

int32_t* sums(uint8_t* panel, int64_t depth) {
  return reinterpret_cast<int32_t*>(panel + panel_bytes(depth) - kLinearInt8Panel * 4);
}

void pack(const int8_t* w, int64_t ldw, int columns, int64_t depth, uint8_t* panel) {
  for (int n = 0; n < columns; ++n) {
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; ++k) {
      panel[n * depth + k] = static_cast<uint8_t>(w[n * ldw + k]);
      sum += w[n * ldw + k];
    }
    sums(panel, depth)[n] = sum;
  }
}

int32_t dot(const int8_t* x, const int8_t* w, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += static_cast<int32_t>(x[k]) * w[k];
  return sum;
}

void block(const LinearInt8Args& a, const uint8_t* panel, int64_t m0, int64_t m1, int64_t n0,
           int columns) {
  const int8_t* w = reinterpret_cast<const int8_t*>(panel);
  const int32_t* w_sum = sums(const_cast<uint8_t*>(panel), a.depth);
  for (int64_t m = m0; m < m1; ++m)
    for (int n = 0; n < columns; ++n) {
      const int8_t* x = a.x + m * a.ldx;
      const float w_scale = a.w_scale[(n0 + n) * a.w_scale_stride];
      float v;
      if (a.pieces <= 1 && !a.group) {
        int32_t acc = dot(x, w + n * a.depth, a.depth);
        if (a.x_zero_point) acc -= a.x_zero_point[m] * w_sum[n];
        v = static_cast<float>(acc) * a.x_scale[m * a.x_scale_stride] * w_scale;
      } else {
        v = 0.0f;
        for (int64_t p = 0; p < a.pieces; ++p) {
          const int64_t k = p * a.piece, count = a.depth - k < a.piece ? a.depth - k : a.piece;
          const float acc = static_cast<float>(dot(x + k, w + n * a.depth + k, count));
          v = v + (a.group ? acc * a.x_scale[m * a.x_scale_stride + p] : acc);
        }
        if (a.x_zero_point)
          v = v - static_cast<float>(a.x_zero_point[m]) * static_cast<float>(w_sum[n]);
        v = (a.group ? v : v * a.x_scale[m * a.x_scale_stride]) * w_scale;
      }
      finish(a.epilogue, v, m, n0 + n);
    }
}

}  // namespace

extern const LinearInt8Kernel linear_int8_generic = {"rows", 1,       panel_bytes, pack,
                                                     block,  nullptr, nullptr,     0};

}  // namespace narrowcast
