#include "common/image.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"
#include "common/step.h"

namespace narrowcast {
namespace {

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

StepImage::StepImage(const TensorView& t) : source_(t), view_(t) {
  if (!defined(t) || is_channels_last(t)) return;
  copy_ = aligned_buffer(numel(t) * element_size(t.dtype));
  view_ = channels_last_at(t, copy_.get());
}

}  // namespace narrowcast
