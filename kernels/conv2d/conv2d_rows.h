// The loops of conv2d, written once over the vectors of common/lanes.h. Internal linkage
// throughout.
#pragma once
#include "common/lanes.h"
#include "conv2d/conv2d.h"
#if defined(__AVX512F__)
#include "common/epilogue_avx512.h"
#elif defined(__AVX2__)
#include "common/epilogue_avx2.h"
#endif

namespace narrowcast {
namespace {

inline void finish_lanes(const Epilogue& e, Lanes::T v, int64_t m, int64_t n, int64_t count) {
#if defined(__AVX512F__)
  finish16(e, v, m, n, mask16(count));
#elif defined(__AVX2__)
  finish8(e, v, m, n, count);
#else
  static_cast<void>(count);
  finish(e, v, m, n);
#endif
}

// What one row of output pixels has in common.
struct DepthwiseRow {
  const Conv2dArgs& a;
  Taps down;
  int64_t first_row;  // of x, in elements: the row of tap 0
  int64_t padded;     // channels in a row of weights
  // The epilogue is a bias in float32 and a clamp, which none, relu and relu6 are.
  bool plain;
  Lanes::T least, most;
};

inline bool is_plain(const Epilogue& e) {
  return !e.residual && (!e.bias || e.bias_dtype == DType::kFloat32) &&
         e.activation <= Activation::kRelu6 && e.post_activation == Activation::kNone;
}

// P neighbouring pixels from `at` on, which share the taps [k0, k1) across; V vectors of channels.
template <DType kDType, int P, int V, bool kTail>
[[gnu::always_inline]] inline void depthwise_block(const DepthwiseRow& r, int64_t at, int64_t k0,
                                                   int64_t k1, int64_t m, int64_t c,
                                                   int64_t count) {
  const Conv2dArgs& a = r.a;
  const Window& window = a.window;
  constexpr int64_t kBytes = kDType == DType::kFloat32 ? 4 : 2;
  // Distances in bytes, kept out of the loops: stores there could change what `a` points to.
  const int64_t pixel = a.channels, next = window.stride[1] * pixel * kBytes,
                tap = window.dilation[1] * pixel * kBytes, padded = r.padded, last = r.down.last;
  const int64_t column = at * window.stride[1] - window.padding[1] + k0 * window.dilation[1];
  const int64_t row = window.dilation[0] * a.width * pixel * kBytes,
                weight_row = window.kernel[1] * padded;
  const int64_t first = r.down.first;
  const char* x_row =
      static_cast<const char*>(a.x) + (r.first_row + column * pixel + c) * kBytes + first * row;
  const float* w_row = static_cast<const float*>(a.packed) + first * weight_row + k0 * padded + c;
  Lanes::T acc[P][V];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[p][v] = Lanes::set(0.0f);
  for (int64_t i = first; i < last; ++i, x_row += row, w_row += weight_row) {
    const char* x = x_row;
    const float* w = w_row;
    for (int64_t j = k0; j < k1; ++j, x += tap, w += padded) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Lanes::T weight = Lanes::load(w, v * Lanes::kWidth, DType::kFloat32);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const char* from = x + p * next;
          const Lanes::T value = kTail ? Lanes::load(from, v * Lanes::kWidth, kDType, count)
                                       : Lanes::load(from, v * Lanes::kWidth, kDType);
          acc[p][v] = Lanes::fma(value, weight, acc[p][v]);
        }
      }
    }
  }
  if (r.plain) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t n = c + v * Lanes::kWidth;
      const Lanes::T bias = !a.epilogue.bias ? Lanes::set(0.0f)
                            : kTail ? Lanes::load(a.epilogue.bias, n, DType::kFloat32, count)
                                    : Lanes::load(a.epilogue.bias, n, DType::kFloat32);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const Lanes::T value = Lanes::min(r.most, Lanes::max(r.least, Lanes::add(acc[p][v], bias)));
        const int64_t to = (m + p) * pixel + n;
        if (kTail)
          Lanes::store(a.epilogue.out, to, kDType, value, count);
        else
          Lanes::store(a.epilogue.out, to, kDType, value);
      }
    }
    return;
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      finish_lanes(a.epilogue, acc[p][v], m + p, c + v * Lanes::kWidth,
                   kTail ? count : Lanes::kWidth);
}

template <DType kDType, int P, int V>
void depthwise_pixels(const DepthwiseRow& r, int64_t at, int64_t k0, int64_t k1, int64_t m) {
  const int64_t channels = r.a.channels;
  int64_t c = 0;
  for (; c + V * Lanes::kWidth <= channels; c += V * Lanes::kWidth)
    depthwise_block<kDType, P, V, false>(r, at, k0, k1, m, c, 0);
  for (; c + Lanes::kWidth <= channels; c += Lanes::kWidth)
    depthwise_block<kDType, P, 1, false>(r, at, k0, k1, m, c, 0);
  if (c < channels) depthwise_block<kDType, P, 1, true>(r, at, k0, k1, m, c, channels - c);
}

template <DType kDType>
void depthwise_row(const Conv2dArgs& a, int64_t row) {
  const int64_t image = row / a.out_height;
  const Taps down = taps_inside(a.window, 0, row % a.out_height, a.height);
  const DepthwiseRow r{a,
                       down,
                       (image * a.height + down.origin) * a.width * a.channels,
                       (a.channels + kDepthwiseStep - 1) / kDepthwiseStep * kDepthwiseStep,
                       is_plain(a.epilogue),
                       Lanes::set(a.epilogue.activation == Activation::kNone ? -INFINITY : 0.0f),
                       Lanes::set(a.epilogue.activation == Activation::kRelu6 ? 6.0f : INFINITY)};
  const int64_t reach = (a.window.kernel[1] - 1) * a.window.dilation[1],
                stride = a.window.stride[1], kernel = a.window.kernel[1];
  for (int64_t at = 0; at < a.out_width;) {
    const int64_t m = row * a.out_width + at, origin = at * stride - a.window.padding[1];
    int64_t whole = 0;  // pixels from here on that have all taps inside
    if (origin >= 0 && origin + reach < a.width) {
      whole = (a.width - 1 - reach - origin) / stride + 1;
      if (whole > a.out_width - at) whole = a.out_width - at;
    }
    if (whole >= 8) {
      depthwise_pixels<kDType, 8, 1>(r, at, 0, kernel, m);
      at += 8;
    } else if (whole >= 4) {
      depthwise_pixels<kDType, 4, 2>(r, at, 0, kernel, m);
      at += 4;
    } else if (whole >= 2) {
      depthwise_pixels<kDType, 2, 4>(r, at, 0, kernel, m);
      at += 2;
    } else {
      const Taps across = taps_inside(a.window, 1, at, a.width);
      depthwise_pixels<kDType, 1, 4>(r, at, across.first, across.last, m);
      at += 1;
    }
  }
}

void depthwise_any(const Conv2dArgs& a, int64_t row) {
  switch (a.dtype) {
    case DType::kFloat32:
      return depthwise_row<DType::kFloat32>(a, row);
    case DType::kFloat16:
      return depthwise_row<DType::kFloat16>(a, row);
    default:
      return depthwise_row<DType::kBFloat16>(a, row);
  }
}

template <DType kTo>
inline void clear(void* to, int64_t at, int64_t count) {
  over_lanes(count,
             [&](int64_t i, int64_t n) { Lanes::store(to, at + i, kTo, Lanes::set(0.0f), n); });
}

template <DType kFrom, DType kTo>
void gather_rows(const Conv2dArgs& a, int64_t group, int64_t p0, int64_t p1, void* to, int64_t ld) {
  const Window& w = a.window;
  const int64_t depth = a.channels / a.groups;
  // Taps side by side in memory are one run.
  const int64_t run = a.groups == 1 && w.dilation[1] == 1 ? w.kernel[1] : 1;
  const int64_t line = w.kernel[1] * depth, height = w.kernel[0];
  int64_t at = p0 % a.out_width, row = p0 / a.out_width, image = row / a.out_height;
  Taps down = taps_inside(w, 0, row % a.out_height, a.height);
  for (int64_t p = p0; p < p1; ++p) {
    const Taps across = taps_inside(w, 1, at, a.width);
    int64_t k = (p - p0) * ld;
    const int64_t end = k + ld;
    if (run == across.last - across.first && down.last - down.first == w.kernel[0] &&
        run == w.kernel[1]) {  // all taps lie inside: one run per line
      int64_t from =
          ((image * a.height + down.origin) * a.width + across.origin) * a.channels + group * depth;
      const int64_t below = w.dilation[0] * a.width * a.channels;
      const void* x = a.x;
      for (int64_t i = 0; i < height; ++i, k += line, from += below)
        over_lanes(line, [&](int64_t c, int64_t n) {
          Lanes::store(to, k + c, kTo, Lanes::load(x, from + c, kFrom, n), n);
        });
    }
    for (int64_t i = k == end - ld ? 0 : height; i < height; ++i) {
      if (i < down.first || i >= down.last) {
        clear<kTo>(to, k, line);
        k += line;
        continue;
      }
      const int64_t x_row = (image * a.height + down.origin + i * w.dilation[0]) * a.width;
      clear<kTo>(to, k, across.first * depth);
      for (int64_t j = across.first; j < across.last; j += run) {
        const int64_t taps = run < across.last - j ? run : across.last - j;
        const int64_t from =
            (x_row + across.origin + j * w.dilation[1]) * a.channels + group * depth;
        over_lanes(taps * depth, [&](int64_t c, int64_t n) {
          Lanes::store(to, k + j * depth + c, kTo, Lanes::load(a.x, from + c, kFrom, n), n);
        });
      }
      clear<kTo>(to, k + across.last * depth, line - across.last * depth);
      k += line;
    }
    clear<kTo>(to, k, end - k);
    if (++at == a.out_width) {
      at = 0, ++row, image = row / a.out_height;
      down = taps_inside(w, 0, row % a.out_height, a.height);
    }
  }
}

void gather_any(const Conv2dArgs& a, int64_t group, int64_t p0, int64_t p1, DType to_dtype,
                void* to, int64_t ld) {
  switch (a.dtype) {
    case DType::kFloat32:
      return gather_rows<DType::kFloat32, DType::kFloat32>(a, group, p0, p1, to, ld);
    case DType::kFloat16:
      return gather_rows<DType::kFloat16, DType::kFloat32>(a, group, p0, p1, to, ld);
    default:
      return to_dtype == DType::kFloat32
                 ? gather_rows<DType::kBFloat16, DType::kFloat32>(a, group, p0, p1, to, ld)
                 : gather_rows<DType::kBFloat16, DType::kBFloat16>(a, group, p0, p1, to, ld);
  }
}

}  // namespace
}  // namespace narrowcast
