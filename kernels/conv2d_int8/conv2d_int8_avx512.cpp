// AVX-512 VNNI. Dense layers: vpdpbusd, 16 output channels to a vector, up to 4 vectors by 6 pixels
// (24 accumulators of the 32 registers), the input broadcast 4 channels at a time. Depthwise
// layers: the KH values over one another in a column are interleaved into groups of 4 once per
// column, and serve every output pixel whose window the column lies in.
//
// Bound: one 512-bit vpdpbusd a cycle, 64 multiply-adds.
#include "common/vec_avx512.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast {
namespace {

__m512 residual16(const ConvEpilogue& e, int64_t at, __mmask16 mask) {
  const __m512i zero = _mm512_set1_epi32(e.residual_zero_point);
  if (e.residual_dtype == DType::kUInt8 || e.residual_dtype == DType::kInt8) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const char*>(e.residual) + at);
    const __m512i r = e.residual_dtype == DType::kUInt8 ? _mm512_cvtepu8_epi32(bytes)
                                                        : _mm512_cvtepi8_epi32(bytes);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(r, zero)),
                         _mm512_set1_ps(e.residual_scale));
  }
  return _mm512_mul_ps(load16(e.residual, at, e.residual_dtype, mask),
                       _mm512_set1_ps(e.residual_scale));
}

// 16 output channels of one pixel.
void finish(const ConvEpilogue& e, __m512i acc, int64_t pixel, int64_t channel) {
  const __mmask16 mask = mask16(e.channels - channel);
  const int64_t at = pixel * e.channels + channel;
  __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(e.scale + channel));
  v = activate16(e.activation, _mm512_add_ps(v, _mm512_loadu_ps(e.bias + channel)));
  if (e.residual) v = _mm512_add_ps(v, residual16(e, at, mask));
  v = activate16(e.post_activation, v);
  if (e.out_dtype != DType::kUInt8 && e.out_dtype != DType::kInt8)
    return store16(e.out, at, e.out_dtype, mask, v);
  v = _mm512_mul_ps(v, _mm512_set1_ps(e.inverse_out_scale));
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1024.0f)), _mm512_set1_ps(1024.0f));
  __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(e.out_zero_point));
  const bool is_signed = e.out_dtype == DType::kInt8;
  q = _mm512_max_epi32(q, _mm512_set1_epi32(is_signed ? -127 : 0));
  q = _mm512_min_epi32(q, _mm512_set1_epi32(is_signed ? 127 : 255));
  _mm_mask_storeu_epi8(static_cast<char*>(e.out) + at, mask, _mm512_cvtepi32_epi8(q));
}

template <int PANELS, int PIXELS>
void tile_of(const ConvTile& t, const ConvEpilogue& e) {
  __m512i acc[PIXELS][PANELS];
  for (int j = 0; j < PANELS; ++j) {
    const __m512i init = _mm512_loadu_si512(t.init + t.first_channel + 16 * j);
    for (int p = 0; p < PIXELS; ++p) acc[p][j] = init;
  }
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(t.flip));
  const int8_t* w = t.weights;
  const int64_t steps = t.depth / 4;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* const* rows = t.rows + tap * PIXELS;
    for (int64_t k = 0; k < steps; ++k, w += 64) {
      __m512i weights[PANELS];
      for (int j = 0; j < PANELS; ++j) weights[j] = _mm512_load_si512(w + j * t.panel_bytes);
#pragma GCC unroll 32
      for (int p = 0; p < PIXELS; ++p) {
        int32_t four;
        __builtin_memcpy(&four, rows[p] + 4 * k, 4);
        const __m512i x = _mm512_xor_si512(_mm512_set1_epi32(four), flip);
#pragma GCC unroll 4
        for (int j = 0; j < PANELS; ++j) acc[p][j] = _mm512_dpbusd_epi32(acc[p][j], x, weights[j]);
      }
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < PIXELS; ++p)
    if (p < t.pixels)
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j)
        finish(e, acc[p][j], t.first_pixel + p, t.first_channel + 16 * j);
}

void tile(const ConvTile& t, const ConvEpilogue& e) {
  switch (t.panels) {
    case 1:
      return tile_of<1, 14>(t, e);
    case 2:
      return tile_of<2, 12>(t, e);
    case 3:
      return tile_of<3, 8>(t, e);
    default:
      return tile_of<4, 6>(t, e);
  }
}

// Depthwise. 64 channels are one block. A group is 4 vertical taps; a column holds, per group, 4
// vectors: vector j, lane l, element e is channel 16 l + 4 j + e, its 4 bytes the taps.

constexpr int64_t kBlock = 64;

int64_t groups_of(int64_t kh) { return (kh + 3) / 4; }

int64_t depthwise_bytes(int64_t channels, int64_t kh, int64_t kw) {
  return (channels + kBlock - 1) / kBlock * kw * groups_of(kh) * 256;
}

int64_t depthwise_scratch(int64_t width, int64_t padding, int64_t kh) {
  return (width + 2 * padding) * groups_of(kh) * 256;
}

// [block][kx][group][vector j][lane l][element e][tap]
void pack_depthwise(const int8_t* w, int64_t channels, int64_t kh, int64_t kw, int8_t* packed) {
  for (int64_t block = 0; block < channels; block += kBlock)
    for (int64_t x = 0; x < kw; ++x)
      for (int64_t g = 0; g < groups_of(kh); ++g)
        for (int64_t at = 0; at < 256; ++at) {
          const int64_t j = at / 64, l = at / 16 % 4, e = at / 4 % 4, y = 4 * g + at % 4;
          const int64_t c = block + 16 * l + 4 * j + e;
          *packed++ = c < channels && y < kh ? w[(c * kh + y) * kw + x] : 0;
        }
}

void interleave(const uint8_t* const* taps, __mmask64 mask, __m512i flip, char* out) {
  __m512i r[4];
  for (int y = 0; y < 4; ++y) r[y] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, taps[y]), flip);
  const __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]), high01 = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(r[2], r[3]), high23 = _mm512_unpackhi_epi8(r[2], r[3]);
  _mm512_store_si512(out, _mm512_unpacklo_epi16(low01, low23));
  _mm512_store_si512(out + 64, _mm512_unpackhi_epi16(low01, low23));
  _mm512_store_si512(out + 128, _mm512_unpacklo_epi16(high01, high23));
  _mm512_store_si512(out + 192, _mm512_unpackhi_epi16(high01, high23));
}

// Vectors in tap order of lanes back to 16 channels each.
void natural_order(__m512i a[4]) {
  const __m512i t0 = _mm512_shuffle_i32x4(a[0], a[1], 0x44);
  const __m512i t1 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
  const __m512i t2 = _mm512_shuffle_i32x4(a[0], a[1], 0xee);
  const __m512i t3 = _mm512_shuffle_i32x4(a[2], a[3], 0xee);
  a[0] = _mm512_shuffle_i32x4(t0, t1, 0x88);
  a[1] = _mm512_shuffle_i32x4(t0, t1, 0xdd);
  a[2] = _mm512_shuffle_i32x4(t2, t3, 0x88);
  a[3] = _mm512_shuffle_i32x4(t2, t3, 0xdd);
}

template <int GROUPS, int KW>  // 0: any
void windows(const DepthwiseRow& d, const ConvEpilogue& e, const char* columns) {
  const int64_t groups = GROUPS ? GROUPS : groups_of(d.kernel_height);
  const int64_t kw = KW ? KW : d.kernel_width;
  for (int64_t ow = 0; ow < d.out_width; ++ow) {
    __m512i acc[4] = {};
    const int8_t* w = d.weights;
#pragma GCC unroll 8
    for (int64_t x = 0; x < kw; ++x) {
      const char* column = columns + (ow * d.stride + x * d.dilation) * groups * 256;
#pragma GCC unroll 2
      for (int64_t g = 0; g < groups; ++g, w += 256, column += 256)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          acc[j] = _mm512_dpbusd_epi32(acc[j], _mm512_load_si512(column + 64 * j),
                                       _mm512_load_si512(w + 64 * j));
    }
    natural_order(acc);
    for (int j = 0; j < 4 && 16 * j < d.count; ++j)
      finish(e, _mm512_add_epi32(acc[j], _mm512_loadu_si512(d.init + d.first_channel + 16 * j)),
             d.first_pixel + ow, d.first_channel + 16 * j);
  }
}

void depthwise(const DepthwiseRow& d, const ConvEpilogue& e) {
  const int64_t groups = groups_of(d.kernel_height);
  const __mmask64 mask = d.count >= 64 ? ~0ull : (1ull << d.count) - 1;
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(d.flip));
  char* columns = static_cast<char*>(d.scratch);
  // The last windows may not reach every column of the right padding.
  const int64_t last = (d.out_width - 1) * d.stride + (d.kernel_width - 1) * d.dilation;
  for (int64_t at = 0; at <= last; ++at) {
    const int64_t iw = at - d.padding;
    const bool inside = iw >= 0 && iw < d.width;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* taps[4];
      for (int64_t y = 0; y < 4; ++y) {
        const int64_t row = 4 * g + y;
        // Past the last tap the weights are 0: any readable bytes do.
        const uint8_t* base = row < d.kernel_height && inside ? d.rows[row] : nullptr;
        taps[y] = base ? base + iw * d.channels + d.first_channel : d.zero_points;
      }
      interleave(taps, mask, flip, columns + (at * groups + g) * 256);
    }
  }
  if (groups == 1 && d.kernel_width == 3) return windows<1, 3>(d, e, columns);
  if (groups == 2 && d.kernel_width == 5) return windows<2, 5>(d, e, columns);
  windows<0, 0>(d, e, columns);
}

}  // namespace

extern const Conv2dInt8Kernel conv2d_int8_avx512 = {16,
                                                    4,
                                                    4,
                                                    {0, 14, 12, 8, 6},
                                                    tile,
                                                    depthwise,
                                                    pack_depthwise,
                                                    depthwise_bytes,
                                                    depthwise_scratch};

}  // namespace narrowcast
