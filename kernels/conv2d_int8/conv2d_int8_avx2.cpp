// AVX2. Bytes are widened to 16 bits, and vpmaddwd adds two exact products (vpmaddubsw would
// saturate). Dense layers: 8 output channels to a vector, pairs of input channels; depthwise
// layers: pairs of taps over one another.
#include <string.h>

#include "common/epilogue_avx2.h"
#include "conv2d_int8/conv2d_int8.h"

namespace narrowcast {
namespace {

constexpr int64_t kBlock = 64;

__m256 residual8(const ConvEpilogue& e, int64_t at, int64_t count) {
  __m256 r;
  if (e.residual_dtype == DType::kUInt8 || e.residual_dtype == DType::kInt8) {
    int64_t bytes = 0;
    memcpy(&bytes, static_cast<const char*>(e.residual) + at, static_cast<size_t>(count));
    const __m128i b = _mm_cvtsi64_si128(bytes);
    const __m256i codes =
        e.residual_dtype == DType::kUInt8 ? _mm256_cvtepu8_epi32(b) : _mm256_cvtepi8_epi32(b);
    r = _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(e.residual_zero_point)));
  } else {
    r = load_up_to8(e.residual, at, e.residual_dtype, count);
  }
  return _mm256_mul_ps(r, _mm256_set1_ps(e.residual_scale));
}

// Up to 8 output channels of one pixel.
void finish(const ConvEpilogue& e, __m256i acc, int64_t pixel, int64_t channel) {
  const int64_t left = e.channels - channel, count = left < 8 ? left : 8;
  const int64_t at = pixel * e.channels + channel;
  if (count <= 0) return;
  __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(acc), _mm256_loadu_ps(e.scale + channel));
  v = activate8_or_skip(e.activation, _mm256_add_ps(v, _mm256_loadu_ps(e.bias + channel)));
  if (e.residual) v = _mm256_add_ps(v, residual8(e, at, count));
  v = activate8_or_skip(e.post_activation, v);
  if (e.out_dtype != DType::kUInt8 && e.out_dtype != DType::kInt8)
    return count == 8 ? store8(e.out, at, e.out_dtype, v)
                      : store8_tail(e.out, at, e.out_dtype, v, count);
  v = _mm256_mul_ps(v, _mm256_set1_ps(e.inverse_out_scale));
  v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-1024.0f)), _mm256_set1_ps(1024.0f));
  __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(e.out_zero_point));
  const bool is_signed = e.out_dtype == DType::kInt8;
  q = _mm256_max_epi32(q, _mm256_set1_epi32(is_signed ? -127 : 0));
  q = _mm256_min_epi32(q, _mm256_set1_epi32(is_signed ? 127 : 255));
  // The values fit 16 bits; the low bytes of those are the codes of either dtype.
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  const __m128i low = _mm_and_si128(words, _mm_set1_epi16(255));
  const int64_t codes = _mm_cvtsi128_si64(_mm_packus_epi16(low, low));
  memcpy(static_cast<char*>(e.out) + at, &codes, static_cast<size_t>(count));
}

template <int PAIR, int PANELS, int PIXELS>
[[gnu::always_inline]] inline void multiply(const __m256i (&x)[PIXELS], const int8_t* w,
                                            int64_t panel_bytes, __m256i (&acc)[PIXELS][PANELS]) {
#pragma GCC unroll 2
  for (int j = 0; j < PANELS; ++j) {
    const __m256i weights = _mm256_cvtepi8_epi16(
        _mm_load_si128(reinterpret_cast<const __m128i*>(w + j * panel_bytes + 16 * PAIR)));
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; ++p)
      acc[p][j] = _mm256_add_epi32(
          acc[p][j], _mm256_madd_epi16(_mm256_shuffle_epi32(x[p], PAIR * 0x55), weights));
  }
}

template <int PANELS, int PIXELS>
void tile_of(const ConvTile& t, const ConvEpilogue& e) {
  __m256i acc[PIXELS][PANELS];
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 2
    for (int j = 0; j < PANELS; ++j)
      acc[p][j] =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.init + t.first_channel + 8 * j));
  const __m128i flip = _mm_set1_epi32(static_cast<int>(t.flip));
  const int8_t* w = t.weights;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* const* rows = t.rows + tap * PIXELS;
    for (int64_t k = 0; k < t.depth; k += 8) {
      const int64_t left = t.depth - k;
      __m256i x[PIXELS];  // 8 input channels as 16 bits, twice
#pragma GCC unroll 8
      for (int p = 0; p < PIXELS; ++p) {
        int64_t bytes = 0;
        memcpy(&bytes, rows[p] + k, static_cast<size_t>(left < 8 ? left : 8));
        const __m128i b = _mm_xor_si128(_mm_cvtsi64_si128(bytes), flip);
        x[p] = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(b));
      }
      multiply<0>(x, w, t.panel_bytes, acc);
      if (left > 2) multiply<1>(x, w, t.panel_bytes, acc);
      if (left > 4) multiply<2>(x, w, t.panel_bytes, acc);
      if (left > 6) multiply<3>(x, w, t.panel_bytes, acc);
      w += 8 * (left < 8 ? left : 8);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p)
    if (p < t.pixels)
#pragma GCC unroll 2
      for (int j = 0; j < PANELS; ++j)
        finish(e, acc[p][j], t.first_pixel + p, t.first_channel + 8 * j);
}

void tile(const ConvTile& t, const ConvEpilogue& e) {
  t.panels == 1 ? tile_of<1, 6>(t, e) : tile_of<2, 4>(t, e);
}

// Depthwise: [block][kx][pair of taps][channel][tap of the pair], 16 bits each.
int64_t pairs_of(int64_t kh) { return (kh + 1) / 2; }

int64_t depthwise_bytes(int64_t channels, int64_t kh, int64_t kw) {
  return (channels + kBlock - 1) / kBlock * kw * pairs_of(kh) * kBlock * 4;
}
int64_t depthwise_scratch(int64_t, int64_t) { return 0; }

void pack_depthwise(const int8_t* w, int64_t channels, int64_t kh, int64_t kw, int8_t* packed) {
  int16_t* to = reinterpret_cast<int16_t*>(packed);
  for (int64_t block = 0; block < channels; block += kBlock)
    for (int64_t x = 0; x < kw; ++x)
      for (int64_t pair = 0; pair < pairs_of(kh); ++pair)
        for (int64_t at = 0; at < 2 * kBlock; ++at) {
          const int64_t c = block + at / 2, y = 2 * pair + at % 2;
          *to++ = c < channels && y < kh ? w[(c * kh + y) * kw + x] : 0;
        }
}

__m128i load_up_to16(const uint8_t* p, int64_t count) {
  if (count >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint8_t buffer[16] = {};
  memcpy(buffer, p, static_cast<size_t>(count));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}

void depthwise(const DepthwiseRow& d, const ConvEpilogue& e) {
  const int64_t pairs = pairs_of(d.kernel_height);
  const __m128i flip = _mm_set1_epi32(static_cast<int>(d.flip));
  for (int64_t ow = 0; ow < d.out_width; ++ow)
    for (int64_t c = 0; c < d.count; c += 16) {
      const auto init = [&](int64_t i) {
        return _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(d.init + d.first_channel + c + i));
      };
      __m256i low = init(0), high = init(8);
      for (int64_t x = 0; x < d.kernel_width; ++x) {
        const int64_t iw = ow * d.stride - d.padding + x * d.dilation;
        const bool inside = iw >= 0 && iw < d.width;
        const auto tap = [&](int64_t y) {
          // Past the last tap the weights are 0: any readable bytes do.
          const uint8_t* row = y < d.kernel_height && inside ? d.rows[y] : nullptr;
          const uint8_t* from = row ? row + iw * d.channels + d.first_channel + c : d.zero_points;
          return _mm_xor_si128(load_up_to16(from, d.count - c), flip);
        };
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const __m128i a = tap(2 * pair), b = tap(2 * pair + 1);
          const __m256i* w =
              reinterpret_cast<const __m256i*>(d.weights + ((x * pairs + pair) * kBlock + c) * 4);
          const __m256i first = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)),
                        second = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
          low = _mm256_add_epi32(low, _mm256_madd_epi16(first, _mm256_load_si256(w)));
          high = _mm256_add_epi32(high, _mm256_madd_epi16(second, _mm256_load_si256(w + 1)));
        }
      }
      finish(e, low, d.first_pixel + ow, d.first_channel + c);
      finish(e, high, d.first_pixel + ow, d.first_channel + c + 8);
    }
}

}  // namespace

extern const Conv2dInt8Kernel conv2d_int8_avx2 = {
    8, 2, 2, {0, 6, 4, 0, 0}, tile, depthwise, pack_depthwise, depthwise_bytes, depthwise_scratch};

}  // namespace narrowcast
