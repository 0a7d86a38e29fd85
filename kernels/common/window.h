// A window that slides over an image: kernel, stride, padding before and after it, and dilation,
// each as (height, width).
#pragma once
#include <cstdint>

namespace narrowcast {

struct Window {
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, end[2] = {0, 0},
          dilation[2] = {1, 1};
};

// Taps [first, last) of output position `at` along axis d (0: height, 1: width) that lie inside an
// image of `size`; tap k lies at at * stride - padding + k * dilation.
struct Taps {
  int64_t origin, first, last;
};

static inline Taps taps_inside(const Window& w, int d, int64_t at, int64_t size) {
  const int64_t origin = at * w.stride[d] - w.padding[d], step = w.dilation[d];
  if (origin >= 0 && origin + (w.kernel[d] - 1) * step < size) return {origin, 0, w.kernel[d]};
  const int64_t first = origin < 0 ? (-origin + step - 1) / step : 0;
  const int64_t end = origin < size ? (size - origin + step - 1) / step : 0;
  const int64_t last = end < w.kernel[d] ? end : w.kernel[d];
  return {origin, first < last ? first : last, last};
}

}  // namespace narrowcast
