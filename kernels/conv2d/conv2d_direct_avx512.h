// A row of output pixels from x where it lies: a line of the kernel is kernel width * C
// neighbouring values of an NHWC image, so each line is a product whose rows of x overlap. For
// layers of few channels, where gathering the taps would take as long as multiplying them.
#pragma once
#include "conv2d/conv2d.h"
#include "linear/linear_tile_avx512.h"

namespace narrowcast {
namespace {

// R neighbouring pixels whose taps [k0, k1) across lie inside the image.
template <int R, int V>
void direct_pixels(const Conv2dArgs& a, const Taps& down, int64_t x_row, const char* panel,
                   int64_t at, int64_t k0, int64_t k1, int64_t m, int64_t n0, int columns) {
  const Window& w = a.window;
  alignas(64) float sums[R * kLinearPanel];
  const int64_t pixel = a.channels * 4, w_row = kLinearPanel * 4;
  const int64_t column = at * w.stride[1] - w.padding[1] + k0;
  const char* x = static_cast<const char*>(a.x) +
                  ((x_row + down.first * w.dilation[0]) * a.width + column) * pixel;
  const char* weights = panel + (down.first * w.kernel[1] + k0) * a.channels * w_row;
  const Lines lines{down.last - down.first, w.dilation[0] * a.width * pixel,
                    w.kernel[1] * a.channels * w_row};
  multiply<Widened<DType::kFloat32>, R, V>(x, w.stride[1] * pixel, weights, (k1 - k0) * a.channels,
                                           sums, true, lines);
  finish_rows<V>(a.epilogue, sums, m, R, n0, columns);
}

template <int V>
void direct_panel(const Conv2dArgs& a, int64_t row, const char* panel, int64_t n0, int columns) {
  constexpr int kMost = V <= 2 ? 12 : 6;  // accumulators: R * V
  const Window& w = a.window;
  const Taps down = taps_inside(w, 0, row % a.out_height, a.height);
  const int64_t x_row = row / a.out_height * a.height + down.origin, m0 = row * a.out_width;
  for (int64_t at = 0; at < a.out_width;) {
    const Taps across = taps_inside(w, 1, at, a.width);
    const int64_t far = (at + kMost - 1) * w.stride[1] - w.padding[1] + w.kernel[1];
    if (across.first == 0 && far <= a.width && at + kMost <= a.out_width) {
      direct_pixels<kMost, V>(a, down, x_row, panel, at, 0, w.kernel[1], m0 + at, n0, columns);
      at += kMost;
    } else {
      direct_pixels<1, V>(a, down, x_row, panel, at, across.first, across.last, m0 + at, n0,
                          columns);
      at += 1;
    }
  }
}

void direct_row(const Conv2dArgs& a, int64_t row) {
  const int64_t depth = a.window.kernel[0] * a.window.kernel[1] * a.channels;
  const char* panel = static_cast<const char*>(a.packed);
  for (int64_t n0 = 0; n0 < a.out_channels; n0 += kLinearPanel, panel += depth * kLinearPanel * 4) {
    const int columns =
        static_cast<int>(a.out_channels - n0 < kLinearPanel ? a.out_channels - n0 : kLinearPanel);
    switch ((columns + 15) / 16) {
      case 1:
        direct_panel<1>(a, row, panel, n0, columns);
        break;
      case 2:
        direct_panel<2>(a, row, panel, n0, columns);
        break;
      case 3:
        direct_panel<3>(a, row, panel, n0, columns);
        break;
      default:
        direct_panel<4>(a, row, panel, n0, columns);
    }
  }
}

}  // namespace
}  // namespace narrowcast
