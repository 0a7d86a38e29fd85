// Packing, selection and the parallel loops.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "common/parallel.h"
#include "common/registry.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast {
namespace {

constexpr Variant<const Conv2dInt8Kernel*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &conv2d_int8_##name},
#include "conv2d_int8/conv2d_int8.inc"
#undef KERNEL
};
NC_VARIANT_LIST(conv2d_int8, const Conv2dInt8Kernel*, kVariants)

constexpr int64_t kAlign = 64, kMaxPixels = 16;
constexpr int64_t kWorthAThread = 1 << 19;  // multiply-adds: some microseconds
constexpr int64_t kFinish = 64;             // the price of one result, in multiply-adds
// Layers of few channels (a network's first) gather the taps of a pixel into one row: the padding
// of K to the kernel's step is paid once instead of per tap.
constexpr int64_t kGatherChannels = 16, kGatherBytes = 1024;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool is_depthwise(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  return k.depthwise && s.groups == s.channels && s.out_channels == s.channels && s.groups > 1;
}
bool is_grouped(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  return s.groups > 1 && !is_depthwise(k, s);
}

bool gathers(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  return s.groups == 1 && taps > 1 && s.channels < kGatherChannels &&
         s.channels % k.depth_step != 0 && taps * s.channels <= kGatherBytes;
}

// Bytes of a packed column: taps times channels, each tap or their sequence rounded up.
int64_t packed_depth(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  return gathers(k, s) ? round_up(taps * s.channels, k.depth_step)
                       : taps * round_up(s.channels, k.depth_step);
}
int64_t panel_bytes(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  return packed_depth(k, s) * k.panel;
}

int64_t weight_bytes(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  if (is_depthwise(k, s)) return k.depthwise_bytes(s.channels, s.kernel_height, s.kernel_width);
  if (is_grouped(k, s))
    return s.out_channels * (s.channels / s.groups) * s.kernel_height * s.kernel_width;
  return (s.out_channels + k.panel - 1) / k.panel * panel_bytes(k, s);
}

// The input with its channels rounded up, when the kernel needs that.
bool pads_channels(const Conv2dInt8Args& a) {
  const Conv2dInt8Kernel& k = *a.weights.kernel;
  return !a.weights.depthwise && !a.weights.grouped && a.shape.channels % k.depth_step != 0 &&
         !gathers(k, a.shape);
}

// An output pixel: image, row, column. Walking is cheaper than dividing.
struct Place {
  int64_t n, y, x;
  Place(const Conv2dInt8Shape& s, int64_t pixel)
      : n(pixel / (s.out_height * s.out_width)),
        y(pixel / s.out_width % s.out_height),
        x(pixel % s.out_width) {}
  void next(const Conv2dInt8Shape& s) {
    if (++x < s.out_width) return;
    x = 0;
    if (++y == s.out_height) y = 0, ++n;
  }
};

// All taps of one output pixel side by side; neighbours along a row of the image in one copy.
void gather(const Conv2dInt8Args& a, const Place& at, uint8_t* to) {
  const Conv2dInt8Shape& s = a.shape;
  const int64_t top = at.y * s.stride_h - s.padding_h, left = at.x * s.stride_w - s.padding_w;
  const int64_t line = s.kernel_width * s.channels, row = s.width * s.channels;
  const uint8_t* image = a.x + at.n * s.height * row;
  const uint8_t* end = a.x + s.batch * s.height * row;
  const bool together = s.dilation_w == 1 && left >= 0 && left + s.kernel_width <= s.width;
  for (int64_t ky = 0; ky < s.kernel_height; ++ky, to += line) {
    const int64_t ih = top + ky * s.dilation_h;
    if (ih < 0 || ih >= s.height) {
      std::memset(to, a.x_zero_point, static_cast<size_t>(line));
    } else if (together) {
      const uint8_t* from = image + ih * row + left * s.channels;
      if (end - from >= round_up(line, 16))  // `to` has room for whole vectors
        for (int64_t i = 0; i < line; i += 16) std::memcpy(to + i, from + i, 16);
      else
        std::memcpy(to, from, static_cast<size_t>(line));
    } else {
      for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
        const int64_t iw = left + kx * s.dilation_w;
        for (int64_t c = 0; c < s.channels; ++c)
          to[kx * s.channels + c] = iw >= 0 && iw < s.width ? image[ih * row + iw * s.channels + c]
                                                            : static_cast<uint8_t>(a.x_zero_point);
      }
    }
  }
}

void run_dense(const Conv2dInt8Args& a, const uint8_t* x, int64_t depth, const uint8_t* zero_row) {
  const Conv2dInt8Shape& s = a.shape;
  const Conv2dInt8Kernel& k = *a.weights.kernel;
  const bool gathered = gathers(k, s);
  const int64_t taps = gathered ? 1 : s.kernel_height * s.kernel_width,
                pixels = s.batch * s.out_height * s.out_width;
  const int64_t panels = (s.out_channels + k.panel - 1) / k.panel;
  // Blocks of nearly equal width: 5 panels are 3 + 2, not 4 + 1.
  const int64_t blocks = (panels + k.max_panels - 1) / k.max_panels;
  const int64_t widest = (panels + blocks - 1) / blocks;
  const int64_t per_tile = k.pixels_per_tile[widest];
  const int64_t tiles = (pixels + per_tile - 1) / per_tile;
  const int64_t bytes = panel_bytes(k, s);
  const bool pointwise = !gathered && taps == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                         s.out_height == s.height && s.out_width == s.width;
  const int64_t work = per_tile * widest * k.panel * (depth * taps + kFinish);

  // Tiles of a block follow one another: its weights stay in the cache.
  parallel_for(
      0, blocks * tiles, std::max<int64_t>(1, kWorthAThread / work),
      [&](int64_t begin, int64_t end) {
        const uint8_t* stack_rows[kMaxPixels * 64];
        alignas(64) uint8_t taken[kMaxPixels * (kGatherBytes + 16)];
        std::unique_ptr<const uint8_t*[]> heap_rows;
        const uint8_t** rows = stack_rows;
        if (taps > 64) {
          heap_rows.reset(new const uint8_t*[kMaxPixels * taps]);
          rows = heap_rows.get();
        }
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t block = unit / tiles, first = unit % tiles * per_tile;
          const int64_t panel0 = block * panels / blocks, panel1 = (block + 1) * panels / blocks;
          const int64_t mine = panel1 - panel0, step = k.pixels_per_tile[mine];
          // A narrower block takes more pixels at a time: walk its tile in the kernel's own steps.
          for (int64_t p0 = first; p0 < std::min(pixels, first + per_tile); p0 += step) {
            ConvTile t;
            t.pixels = std::min(step, std::min(pixels, first + per_tile) - p0);
            if (pointwise)
              for (int64_t p = 0; p < step; ++p)
                rows[p] = x + (p0 + std::min(p, t.pixels - 1)) * depth;
            Place at(s, p0);
            // The pixels that a last tile lacks repeat its last one.
            for (int64_t p = 0; p < step && !pointwise; ++p) {
              if (p > 0 && p < t.pixels) at.next(s);
              if (gathered) {
                uint8_t* row = taken + p * (kGatherBytes + 16);
                if (p < t.pixels) gather(a, at, row);
                rows[p] = row;
                continue;
              }
              const int64_t top = at.y * s.stride_h - s.padding_h;
              const int64_t left = at.x * s.stride_w - s.padding_w;
              const uint8_t* image = x + at.n * s.height * s.width * depth;
              for (int64_t ky = 0; ky < s.kernel_height; ++ky)
                for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
                  const int64_t ih = top + ky * s.dilation_h, iw = left + kx * s.dilation_w;
                  const bool inside = ih >= 0 && ih < s.height && iw >= 0 && iw < s.width;
                  const int64_t tap = ky * s.kernel_width + kx;
                  // The portable kernel takes one pixel at a time, so both orders are the same
                  // there.
                  rows[tap * step + p] = inside ? image + (ih * s.width + iw) * depth : zero_row;
                }
            }
            t.rows = rows;
            t.taps = taps, t.depth = depth;
            t.weights = a.weights.packed + panel0 * bytes, t.panel_bytes = bytes;
            t.init = a.weights.init;
            t.flip = a.x_signed ? 0x80808080u : 0;
            t.first_pixel = p0;
            t.first_channel = panel0 * k.panel, t.panels = mine;
            k.tile(t, a.epilogue);
          }
        }
      });
}

void run_depthwise(const Conv2dInt8Args& a, uint8_t* scratch, const uint8_t* zero_row) {
  const Conv2dInt8Shape& s = a.shape;
  const Conv2dInt8Kernel& k = *a.weights.kernel;
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (s.channels + kBlock - 1) / kBlock, rows = s.batch * s.out_height;
  const int64_t per_thread = round_up(
      k.depthwise_scratch(s.width + s.padding_w + s.padding_right, s.kernel_height), kAlign);
  const int64_t block_bytes = k.depthwise_bytes(kBlock, s.kernel_height, s.kernel_width);
  const int64_t work = s.out_width * kBlock * (s.kernel_height * s.kernel_width + kFinish);
  // One piece per thread at most: each owns its part of the scratch memory.
  const int64_t units = blocks * rows;
  const int64_t pieces = std::clamp<int64_t>(units * work / kWorthAThread, 1,
                                             std::min<int64_t>(units, thread_count()));
  parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    const uint8_t* taps[64];
    for (int64_t piece = first; piece < last; ++piece)
      for (int64_t unit = piece * units / pieces; unit < (piece + 1) * units / pieces; ++unit) {
        // All channels of a row, then the next row: its inputs are near when they are read again.
        const int64_t block = unit % blocks, row = unit / blocks;
        const int64_t n = row / s.out_height, top = row % s.out_height * s.stride_h - s.padding_h;
        for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
          const int64_t ih = top + ky * s.dilation_h;
          taps[ky] =
              ih >= 0 && ih < s.height ? a.x + (n * s.height + ih) * s.width * s.channels : nullptr;
        }
        DepthwiseRow d;
        d.rows = taps;
        d.zero_points = zero_row;
        d.weights = a.weights.packed + block * block_bytes;
        d.init = a.weights.init;
        d.scratch = scratch + piece * per_thread;
        d.flip = a.x_signed ? 0x80808080u : 0;
        d.width = s.width, d.channels = s.channels;
        d.kernel_height = s.kernel_height, d.kernel_width = s.kernel_width;
        d.stride = s.stride_w, d.padding = s.padding_w, d.dilation = s.dilation_w;
        d.out_width = s.out_width, d.first_pixel = row * s.out_width;
        d.first_channel = block * kBlock, d.count = std::min(kBlock, s.channels - block * kBlock);
        k.depthwise(d, a.epilogue);
      }
  });
}

bool is_code(DType t) { return t == DType::kUInt8 || t == DType::kInt8; }

void choose_codes(ConvEpilogue& e, float largest) {
  const float inverse = e.inverse_out_scale;
  if (e.residual) largest += 512.0f * std::fabs(e.residual_scale);
  e.codes = is_code(e.out_dtype) && (!e.residual || is_code(e.residual_dtype)) &&
            e.activation <= Activation::kRelu6 && e.post_activation <= Activation::kRelu6 &&
            inverse > 0.0f && largest * inverse < 1073741824.0f && std::isfinite(inverse) &&
            std::isfinite(largest);
  if (!e.codes) return;
  e.low = e.out_dtype == DType::kInt8 ? -127 : 0;
  e.high = e.low + (e.low < 0 ? 254 : 255);
  const auto clamp = [&](Activation activation) {
    const float six = std::min(6.0f * inverse, 1024.0f);
    if (activation != Activation::kNone) e.low = std::max(e.low, e.out_zero_point);
    if (activation == Activation::kRelu6)
      e.high = std::min(e.high, static_cast<int32_t>(std::nearbyint(six)) + e.out_zero_point);
  };
  if (!e.residual) clamp(e.activation);
  clamp(e.post_activation);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  e.least = e.activation == Activation::kNone ? -infinity : 0.0f;
  e.most = e.activation == Activation::kRelu6 ? 6.0f : infinity;
}

// Any groups: plain loops.
void run_grouped(const Conv2dInt8Args& a) {
  const Conv2dInt8Shape& s = a.shape;
  const int64_t depth = s.channels / s.groups, per_group = s.out_channels / s.groups;
  const int32_t zero = a.x_zero_point;
  const int64_t work = s.out_width * s.out_channels * depth * s.kernel_height * s.kernel_width;
  parallel_for(
      0, s.batch * s.out_height,
      std::max<int64_t>(1, kWorthAThread / 16 / std::max<int64_t>(work, 1)),
      [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t ow = 0; ow < s.out_width; ++ow)
            for (int64_t o = 0; o < s.out_channels; ++o) {
              const int64_t n = row / s.out_height, oh = row % s.out_height;
              int32_t acc = 0;
              for (int64_t ky = 0; ky < s.kernel_height; ++ky)
                for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
                  const int64_t ih = oh * s.stride_h - s.padding_h + ky * s.dilation_h;
                  const int64_t iw = ow * s.stride_w - s.padding_w + kx * s.dilation_w;
                  if (ih < 0 || ih >= s.height || iw < 0 || iw >= s.width) continue;
                  const uint8_t* x = a.x + ((n * s.height + ih) * s.width + iw) * s.channels +
                                     o / per_group * depth;
                  const int8_t* w =
                      a.weights.packed + (o * depth * s.kernel_height + ky) * s.kernel_width + kx;
                  for (int64_t c = 0; c < depth; ++c) {
                    const int32_t v = a.x_signed ? static_cast<int8_t>(x[c]) : x[c];
                    acc += (v - zero) * w[c * s.kernel_height * s.kernel_width];
                  }
                }
              conv2d_int8_finish(a.epilogue, acc, row * s.out_width + ow, o);
            }
      });
}

}  // namespace

const Conv2dInt8Kernel& conv2d_int8_kernel() { return *select_conv2d_int8(); }

int64_t conv2d_int8_packed_bytes(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  return round_up(weight_bytes(k, s), kAlign) + 3 * 4 * round_up(s.out_channels, 64) + kAlign;
}

static Conv2dInt8Weights describe(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s,
                                  void* memory) {
  const int8_t* packed = static_cast<const int8_t*>(memory);
  const int64_t channels = round_up(s.out_channels, 64);
  const auto* init =
      reinterpret_cast<const int32_t*>(packed + round_up(weight_bytes(k, s), kAlign));
  const auto* scale = reinterpret_cast<const float*>(init + channels);
  return {&k, is_depthwise(k, s), is_grouped(k, s), packed, init, scale, scale + channels};
}

static float largest_value(const Conv2dInt8Weights& w, int64_t channels) {
  float largest = 0.0f;
  for (int64_t o = 0; o < channels; ++o) {
    const float v = std::fabs(w.scale[o]) * 2147483648.0f + std::fabs(w.bias[o]);
    if (!(v <= largest)) largest = std::isfinite(v) ? v : std::numeric_limits<float>::infinity();
  }
  return largest;
}

Conv2dInt8Weights conv2d_int8_weights(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s,
                                      void* memory) {
  Conv2dInt8Weights w = describe(k, s, memory);
  w.largest = largest_value(w, s.out_channels);
  return w;
}

Conv2dInt8Weights conv2d_int8_pack(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s,
                                   const int8_t* w, const float* w_scale, int64_t w_scale_count,
                                   const float* bias, float x_scale, int32_t x_zero_point,
                                   bool x_signed, void* memory) {
  Conv2dInt8Weights result = describe(k, s, memory);
  int8_t* packed = static_cast<int8_t*>(memory);
  const int64_t channels = round_up(s.out_channels, 64);
  int32_t* init = const_cast<int32_t*>(result.init);
  float *scale = const_cast<float*>(result.scale), *offset = const_cast<float*>(result.bias);
  const int64_t taps = s.kernel_height * s.kernel_width, depth = s.channels / s.groups;
  const int32_t zero = x_zero_point + (x_signed ? 128 : 0);
  for (int64_t o = 0; o < channels; ++o) {
    int32_t sum = 0;
    if (o < s.out_channels)
      for (int64_t i = 0; i < depth * taps; ++i) sum += w[o * depth * taps + i];
    init[o] = static_cast<int32_t>(-static_cast<int64_t>(zero) * sum);
    scale[o] = o < s.out_channels ? x_scale * w_scale[w_scale_count == 1 ? 0 : o] : 0.0f;
    offset[o] = o < s.out_channels && bias ? bias[o] : 0.0f;
  }
  result.largest = largest_value(result, s.out_channels);
  if (is_depthwise(k, s)) {
    k.pack_depthwise(w, s.channels, s.kernel_height, s.kernel_width, packed);
  } else if (is_grouped(k, s)) {
    std::memcpy(packed, w, static_cast<size_t>(weight_bytes(k, s)));
  } else {
    const int64_t padded = gathers(k, s) ? s.channels : round_up(s.channels, k.depth_step);
    std::memset(packed, 0, static_cast<size_t>(weight_bytes(k, s)));
    for (int64_t o = 0; o < s.out_channels; ++o)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < s.channels; ++c) {
          const int64_t deep = tap * padded + c, step = k.depth_step;
          const int64_t at = (deep / step * k.panel + o % k.panel) * step + deep % step;
          packed[o / k.panel * panel_bytes(k, s) + at] = w[(o * s.channels + c) * taps + tap];
        }
  }
  return result;
}

int64_t conv2d_int8_scratch(const Conv2dInt8Kernel& k, const Conv2dInt8Shape& s) {
  const int64_t zero_row = round_up(round_up(s.channels, 64), kAlign);
  if (is_depthwise(k, s))
    return zero_row +
           thread_count() * round_up(k.depthwise_scratch(s.width + s.padding_w + s.padding_right,
                                                         s.kernel_height),
                                     kAlign);
  if (s.groups == 1 && s.channels % k.depth_step != 0 && !gathers(k, s))
    return zero_row + s.batch * s.height * s.width * round_up(s.channels, k.depth_step);
  return zero_row;
}

void conv2d_int8_run(Conv2dInt8Args a) {
  const Conv2dInt8Shape& s = a.shape;
  if (s.batch * s.out_height * s.out_width * s.out_channels == 0) return;
  choose_codes(a.epilogue, a.weights.largest);
  if (a.weights.grouped) return run_grouped(a);
  uint8_t* zero_row = static_cast<uint8_t*>(a.scratch);
  const int64_t zero_bytes = round_up(round_up(s.channels, 64), kAlign);
  std::memset(zero_row, a.x_zero_point, static_cast<size_t>(zero_bytes));
  uint8_t* rest = zero_row + zero_bytes;
  if (a.weights.depthwise) return run_depthwise(a, rest, zero_row);
  if (gathers(*a.weights.kernel, s))
    return run_dense(a, a.x, packed_depth(*a.weights.kernel, s), zero_row);
  if (!pads_channels(a)) return run_dense(a, a.x, s.channels, zero_row);
  const int64_t depth = round_up(s.channels, a.weights.kernel->depth_step);
  parallel_for(0, s.batch * s.height * s.width, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      std::memcpy(rest + p * depth, a.x + p * s.channels, static_cast<size_t>(s.channels));
      std::memset(rest + p * depth + s.channels, 0, static_cast<size_t>(depth - s.channels));
    }
  });
  run_dense(a, rest, depth, zero_row);
}

}  // namespace narrowcast
