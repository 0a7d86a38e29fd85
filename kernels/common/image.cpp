#include "common/image.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"
#include "common/step.h"

namespace narrowcast {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;

// One row of pixels, in tiles: an NCHW source is read along W, the NHWC result written along C.
template <class T>
void copy_row(const T* from, int64_t channel_step, int64_t pixel_step, int64_t channels,
              int64_t width, T* to) {
  constexpr int64_t kTile = 16;
  for (int64_t w0 = 0; w0 < width; w0 += kTile) {
    const int64_t w1 = std::min(width, w0 + kTile);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t w = w0; w < w1; ++w)
        to[w * channels + c] = from[c * channel_step + w * pixel_step];
  }
}

template <class T>
void copy_image(const TensorView& t, T* to) {
  const int64_t channels = t.sizes[1], height = t.sizes[2], width = t.sizes[3];
  const int64_t row = std::max<int64_t>(1, channels * width);
  const T* from = static_cast<const T*>(t.data);
  parallel_for(0, t.sizes[0] * height, std::max<int64_t>(1, 32768 / row),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   copy_row(from + i / height * t.strides[0] + i % height * t.strides[2],
                            t.strides[1], t.strides[3], channels, width, to + i * channels * width);
               });
}

std::vector<int64_t> pair_of(const char* op, const char* argument, const std::vector<int64_t>& v,
                             int64_t least, int64_t otherwise) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  if (v.empty()) return {otherwise, otherwise};
  NC_CHECK(v.size() == 2 && v[0] >= least && v[1] >= least && v[0] <= most && v[1] <= most, op,
           argument, " must be 2 numbers from ", least, " to ", most, ", got ", v.size(),
           " beginning with ", v[0]);
  return v;
}

}  // namespace

bool is_channels_last(const TensorView& t) {
  if (t.rank != 4) return false;
  if (numel(t) == 0) return true;
  constexpr int order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (const int d : order) {
    if (t.sizes[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

TensorView channels_last_at(const TensorView& t, void* data) {
  TensorView v = t;
  v.data = data;
  v.strides[1] = 1, v.strides[3] = t.sizes[1], v.strides[2] = t.sizes[1] * t.sizes[3];
  v.strides[0] = v.strides[2] * t.sizes[2];
  return v;
}

void copy_channels_last(const TensorView& from, void* to) {
  if (numel(from) == 0) return;
  switch (element_size(from.dtype)) {
    case 1:
      return copy_image(from, static_cast<uint8_t*>(to));
    case 2:
      return copy_image(from, static_cast<uint16_t*>(to));
    case 4:
      return copy_image(from, static_cast<uint32_t*>(to));
    default:
      return copy_image(from, static_cast<uint64_t*>(to));
  }
}

void check_image(const char* op, const char* argument, const TensorView& t) {
  NC_CHECK(t.rank == 4 && t.sizes[2] >= 1 && t.sizes[3] >= 1 && numel(t) <= kMost, op, argument,
           " must be [N, C, H, W] with H and W at least 1 and at most 2^40 elements, got ",
           shape(t));
}

Window make_window(const char* op, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation) {
  const auto k = pair_of(op, "kernel_size", kernel, 1, 1), s = pair_of(op, "stride", stride, 1, 1),
             p = pair_of(op, "padding", padding, 0, 0), d = pair_of(op, "dilation", dilation, 1, 1);
  Window w;
  for (int i = 0; i < 2; ++i)
    w.kernel[i] = k[i], w.stride[i] = s[i], w.padding[i] = p[i], w.dilation[i] = d[i];
  return w;
}

int64_t window_positions(const char* op, const Window& w, int d, int64_t size, bool ceil,
                         const char* argument) {
  const int64_t extent = w.dilation[d] * (w.kernel[d] - 1) + 1;
  const int64_t span = size + 2 * w.padding[d] - extent;
  NC_CHECK(span >= 0, op, argument, " must fit the padded image, got ", w.kernel[d],
           " with dilation ", w.dilation[d], " on ", size, " with padding ", w.padding[d]);
  if (!ceil) return span / w.stride[d] + 1;
  const int64_t positions = (span + w.stride[d] - 1) / w.stride[d] + 1;
  return (positions - 1) * w.stride[d] >= size + w.padding[d] ? positions - 1 : positions;
}

StepImage::StepImage(const TensorView& t) : source_(t), view_(t) {
  if (!defined(t) || is_channels_last(t)) return;
  copy_ = aligned_buffer(numel(t) * element_size(t.dtype));
  view_ = channels_last_at(t, copy_.get());
}

}  // namespace narrowcast
