// AVX-512 VNNI. Dense layers: vpdpbusd, 16 output channels to a vector, up to 4 vectors by 6 pixels
// (24 accumulators of the 32 registers), the input broadcast 4 channels at a time. Depthwise
// layers: the KH values over one another in a column are interleaved into groups of 4 once per
// column, and serve every output pixel whose window the column lies in.
//
// Bound: one 512-bit vpdpbusd a cycle, 64 multiply-adds.
#include "common/dot4_avx512.h"
#include "conv2d_int8/conv2d_int8_codes_avx512.h"

namespace narrowcast {
namespace {

// The codes of a tile, 64 at a time: 4 panels of a pixel, 2 of two pixels, 1 of four.
template <int PANELS, int PIXELS, bool kResidual>
[[gnu::always_inline]] inline void finish_codes(const ConvTile& t, const ConvEpilogue& e,
                                                const __m512i (&acc)[PIXELS][PANELS]) {
  constexpr int kTogether = PANELS == 1 ? 4 : PANELS == 2 ? 2 : 1, kBytes = 16 * PANELS;
  static_assert(PIXELS % kTogether == 0);
  const Codes codes(e);
  const float *scale = e.scale + t.first_channel, *bias = e.bias + t.first_channel;
  const int64_t left = e.channels - t.first_channel, width = left < kBytes ? left : kBytes;
  const __mmask64 mask = width >= 64 ? ~0ull : (1ull << width) - 1;
#pragma GCC unroll 32
  for (int p = 0; p < PIXELS; p += kTogether) {
    if (p >= t.pixels) return;
    const int64_t at = (t.first_pixel + p) * e.channels + t.first_channel;
    __m512i q[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j) {
        __m512 v = codes.value(acc[p + i][j], scale + 16 * j, bias + 16 * j);
        if (kResidual && p + i < t.pixels)
          v = _mm512_add_ps(_mm512_min_ps(_mm512_max_ps(v, codes.least), codes.most),
                            residual16(e, at + i * e.channels + 16 * j, mask16(left - 16 * j)));
        q[i * PANELS + j] = codes.round(v);
      }
    const __m512i bytes = in_order(codes.pack(q[0], q[1], q[2], q[3]));
    char* out = static_cast<char*>(e.out) + at;
    if (kTogether == 1) {
      _mm512_mask_storeu_epi8(out, mask, bytes);
    } else if (kTogether == 2) {
      const __mmask32 half = static_cast<__mmask32>(mask);
      _mm256_mask_storeu_epi8(out, half, _mm512_castsi512_si256(bytes));
      if (p + 1 < t.pixels)
        _mm256_mask_storeu_epi8(out + e.channels, half, _mm512_extracti64x4_epi64(bytes, 1));
    } else {
      const __mmask16 quarter = static_cast<__mmask16>(mask);
      _mm_mask_storeu_epi8(out, quarter, _mm512_castsi512_si128(bytes));
      if (p + 1 < t.pixels)
        _mm_mask_storeu_epi8(out + e.channels, quarter, _mm512_extracti32x4_epi32(bytes, 1));
      if (p + 2 < t.pixels)
        _mm_mask_storeu_epi8(out + 2 * e.channels, quarter, _mm512_extracti32x4_epi32(bytes, 2));
      if (p + 3 < t.pixels)
        _mm_mask_storeu_epi8(out + 3 * e.channels, quarter, _mm512_extracti32x4_epi32(bytes, 3));
    }
  }
}

template <int PANELS, int PIXELS, bool kFlip>
void tile_of(const ConvTile& t, const ConvEpilogue& e) {
  __m512i acc[PIXELS][PANELS];
#pragma GCC unroll 4
  for (int j = 0; j < PANELS; ++j) {
    const __m512i init = _mm512_loadu_si512(t.init + t.first_channel + 16 * j);
#pragma GCC unroll 32
    for (int p = 0; p < PIXELS; ++p) acc[p][j] = init;
  }
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(t.flip));
  const int8_t* w = t.weights;
  const int64_t steps = t.depth / 4;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* const* rows = t.rows + tap * PIXELS;
    for (int64_t k = 0; k < steps; ++k, w += 64) {
      __m512i weights[PANELS];
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j) weights[j] = _mm512_load_si512(w + j * t.panel_bytes);
#pragma GCC unroll 32
      for (int p = 0; p < PIXELS; ++p) {
        int32_t four;
        __builtin_memcpy(&four, rows[p] + 4 * k, 4);
        __m512i x = _mm512_set1_epi32(four);
        if (kFlip) x = _mm512_xor_si512(x, flip);
#pragma GCC unroll 4
        for (int j = 0; j < PANELS; ++j) acc[p][j] = _mm512_dpbusd_epi32(acc[p][j], x, weights[j]);
      }
    }
  }
  if (e.codes)
    return e.residual ? finish_codes<PANELS, PIXELS, true>(t, e, acc)
                      : finish_codes<PANELS, PIXELS, false>(t, e, acc);
#pragma GCC unroll 32
  for (int p = 0; p < PIXELS; ++p)
    if (p < t.pixels)
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j)
        finish(e, acc[p][j], t.first_pixel + p, t.first_channel + 16 * j);
}

template <bool kFlip>
void tile_any(const ConvTile& t, const ConvEpilogue& e) {
  switch (t.panels) {
    case 1:
      return tile_of<1, 12, kFlip>(t, e);
    case 2:
      return tile_of<2, 12, kFlip>(t, e);
    case 3:
      return tile_of<3, 8, kFlip>(t, e);
    default:
      return tile_of<4, 6, kFlip>(t, e);
  }
}

void tile(const ConvTile& t, const ConvEpilogue& e) {
  t.flip ? tile_any<true>(t, e) : tile_any<false>(t, e);
}

// Depthwise. 64 channels are one block, and a last block of at most 32 is a half one. A group is 4
// vertical taps. Lane l of vector j of a column has the 4 bytes of the taps for each of the
// channels 16 l + 4 j + e; a vector of a half block is 2 lanes long, and two of them share a
// register. Packing 32-bit sums to bytes undoes just this order of places, so the epilogue runs in
// it.

constexpr int64_t kBlock = 64;

int64_t groups_of(int64_t kh) { return (kh + 3) / 4; }
int64_t block_width(int64_t count) { return count <= kBlock / 2 ? kBlock / 2 : kBlock; }

int64_t depthwise_bytes(int64_t channels, int64_t kh, int64_t kw) {
  return (channels + kBlock - 1) / kBlock * kw * groups_of(kh) * 256;
}

int64_t depthwise_scratch(int64_t padded_width, int64_t kh) {
  return padded_width * groups_of(kh) * 256;
}

// The channel at place `at` of a block.
int64_t channel_at(int64_t at, int64_t width) {
  const int64_t lanes = width / 16;
  return at / 4 % lanes * 16 + at / (4 * lanes) * 4 + at % 4;
}

// [block][kx][group][place][tap]
void pack_depthwise(const int8_t* w, int64_t channels, int64_t kh, int64_t kw, int8_t* packed) {
  for (int64_t block = 0; block < channels; block += kBlock) {
    const int64_t width = block_width(channels - block);
    int8_t* to = packed + block / kBlock * kw * groups_of(kh) * 256;
    for (int64_t x = 0; x < kw; ++x)
      for (int64_t g = 0; g < groups_of(kh); ++g)
        for (int64_t at = 0; at < 4 * width; ++at) {
          const int64_t y = 4 * g + at % 4, c = block + channel_at(at / 4, width);
          *to++ = c < channels && y < kh ? w[(c * kh + y) * kw + x] : 0;
        }
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

void interleave_half(const uint8_t* const* taps, __mmask32 mask, __m256i flip, char* out) {
  __m256i r[4];
  for (int y = 0; y < 4; ++y) r[y] = _mm256_xor_si256(_mm256_maskz_loadu_epi8(mask, taps[y]), flip);
  const __m256i low01 = _mm256_unpacklo_epi8(r[0], r[1]), high01 = _mm256_unpackhi_epi8(r[0], r[1]);
  const __m256i low23 = _mm256_unpacklo_epi8(r[2], r[3]), high23 = _mm256_unpackhi_epi8(r[2], r[3]);
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_store_si256(to, _mm256_unpacklo_epi16(low01, low23));
  _mm256_store_si256(to + 1, _mm256_unpackhi_epi16(low01, low23));
  _mm256_store_si256(to + 2, _mm256_unpacklo_epi16(high01, high23));
  _mm256_store_si256(to + 3, _mm256_unpackhi_epi16(high01, high23));
}

// Sums in the order of places back to 16 channels each.
template <int V>
void natural_order(__m512i (&a)[V]) {
  if constexpr (V == 2) {
    const __m512i first = _mm512_shuffle_i32x4(a[0], a[1], 0x88);
    a[1] = _mm512_shuffle_i32x4(a[0], a[1], 0xdd);
    a[0] = first;
  } else {
    const __m512i t0 = _mm512_shuffle_i32x4(a[0], a[1], 0x44);
    const __m512i t1 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
    const __m512i t2 = _mm512_shuffle_i32x4(a[0], a[1], 0xee);
    const __m512i t3 = _mm512_shuffle_i32x4(a[2], a[3], 0xee);
    a[0] = _mm512_shuffle_i32x4(t0, t1, 0x88);
    a[1] = _mm512_shuffle_i32x4(t0, t1, 0xdd);
    a[2] = _mm512_shuffle_i32x4(t2, t3, 0x88);
    a[3] = _mm512_shuffle_i32x4(t2, t3, 0xdd);
  }
}

// The way back.
template <int V>
void place_order(__m512i (&a)[V]) {
  if constexpr (V == 4) return natural_order(a);  // a transposition of lanes
  const __m512i first = _mm512_shuffle_i32x4(a[0], a[1], 0x44);
  const __m512i second = _mm512_shuffle_i32x4(a[0], a[1], 0xee);
  a[0] = _mm512_shuffle_i32x4(first, first, 0xd8);
  a[1] = _mm512_shuffle_i32x4(second, second, 0xd8);
}

// What the epilogue needs of a block's channels, in the order of places.
template <int V>
struct Places {
  alignas(64) int32_t init[16 * V];
  alignas(64) float scale[16 * V], bias[16 * V];

  static void put(const void* from, void* to) {
    __m512i a[V];
    for (int j = 0; j < V; ++j) a[j] = _mm512_loadu_si512(static_cast<const char*>(from) + 64 * j);
    place_order(a);
    for (int j = 0; j < V; ++j) _mm512_store_si512(static_cast<char*>(to) + 64 * j, a[j]);
  }
  // The arrays of channels are padded to 64.
  Places(const DepthwiseRow& d, const ConvEpilogue& e) {
    put(d.init + d.first_channel, init);
    put(e.scale + d.first_channel, scale);
    put(e.bias + d.first_channel, bias);
  }
};

template <int V>  // registers of a block: 4, or 2 of a half one
void store_codes(const Codes& codes, const Places<V>& places, const __m512i (&acc)[V], char* out,
                 __mmask64 mask) {
  __m512i q[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j)
    q[j] = codes.round(codes.value(acc[j], places.scale + 16 * j, places.bias + 16 * j));
  if constexpr (V == 4) {
    _mm512_mask_storeu_epi8(out, mask, codes.pack(q[0], q[1], q[2], q[3]));
  } else {  // lanes 0, 1: channels 0-3, 8-11 | lanes 2, 3: 4-7, 12-15
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), codes.zero);
    __m256i b = _mm256_packus_epi16(_mm512_castsi512_si256(ab), _mm512_extracti64x4_epi64(ab, 1));
    b = _mm256_shuffle_epi32(b, 0xd8);
    b = _mm256_min_epu8(_mm256_max_epu8(b, _mm512_castsi512_si256(codes.low)),
                        _mm512_castsi512_si256(codes.high));
    b = _mm256_xor_si256(b, _mm512_castsi512_si256(codes.flip));
    _mm256_mask_storeu_epi8(out, static_cast<__mmask32>(mask), b);
  }
}

constexpr int kPixels = 7;  // of a step: rows of 224 / 2^n pixels are made of whole steps

// The sums of P neighbouring pixels, [pixel][place], from the first column of the first one's
// window. One register of places after the other: its weights stay in registers, and a column is
// read once for all windows it lies in.
template <int GROUPS, int KW, int STRIDE, int V, int P>
void sum_pixels(const char* columns, const int8_t* w, const int32_t* init, int32_t* sums) {
  for (int j = 0; j < V; ++j) {
    __m512i weights[KW * GROUPS], acc[P];
#pragma GCC unroll 16
    for (int i = 0; i < KW * GROUPS; ++i) weights[i] = _mm512_load_si512(w + (i * V + j) * 64);
    const __m512i start = _mm512_load_si512(init + 16 * j);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) acc[p] = start;
#pragma GCC unroll 32
    for (int t = 0; t < (P - 1) * STRIDE + KW; ++t)
#pragma GCC unroll 2
      for (int g = 0; g < GROUPS; ++g) {
        const __m512i x = _mm512_load_si512(columns + ((t * GROUPS + g) * V + j) * 64);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
          if (t >= p * STRIDE && t < p * STRIDE + KW)
            dot4(acc[p], x, weights[(t - p * STRIDE) * GROUPS + g]);
      }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) _mm512_store_si512(sums + (p * V + j) * 16, acc[p]);
  }
}

template <int V>  // any window, one pixel
void sum_pixel(const DepthwiseRow& d, const char* columns, const int32_t* init, int32_t* sums) {
  const int64_t groups = groups_of(d.kernel_height);
  __m512i acc[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) acc[j] = _mm512_load_si512(init + 16 * j);
  const int8_t* w = d.weights;
  for (int64_t x = 0; x < d.kernel_width; ++x) {
    const char* column = columns + x * d.dilation * groups * V * 64;
    for (int64_t g = 0; g < groups; ++g, w += V * 64, column += V * 64)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j)
        dot4(acc[j], _mm512_load_si512(column + 64 * j), _mm512_load_si512(w + 64 * j));
  }
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) _mm512_store_si512(sums + j * 16, acc[j]);
}

// `many`: the sums of kPixels pixels, or nullptr.
template <int V>
void windows(const DepthwiseRow& d, const ConvEpilogue& e, const char* columns, __mmask64 mask,
             void (*many)(const char*, const int8_t*, const int32_t*, int32_t*)) {
  const int64_t step = d.stride * groups_of(d.kernel_height) * V * 64;
  const bool in_codes = e.codes && !e.residual;
  const Codes codes(e);
  const Places<V> places(d, e);
  alignas(64) int32_t sums[kPixels * V * 16];
  for (int64_t ow = 0; ow < d.out_width;) {
    const bool whole = many && ow + kPixels <= d.out_width;
    if (whole)
      many(columns + ow * step, d.weights, places.init, sums);
    else
      sum_pixel<V>(d, columns + ow * step, places.init, sums);
    for (int p = 0; p < (whole ? kPixels : 1); ++p, ++ow) {
      __m512i acc[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[j] = _mm512_load_si512(sums + (p * V + j) * 16);
      const int64_t pixel = d.first_pixel + ow;
      if (in_codes) {
        store_codes<V>(codes, places, acc,
                       static_cast<char*>(e.out) + pixel * e.channels + d.first_channel, mask);
        continue;
      }
      natural_order(acc);
      for (int j = 0; j < V && 16 * j < d.count; ++j)
        finish(e, acc[j], pixel, d.first_channel + 16 * j);
    }
  }
}

template <int V>
void depthwise_block(const DepthwiseRow& d, const ConvEpilogue& e) {
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
      char* to = columns + (at * groups + g) * V * 64;
      if constexpr (V == 4)
        interleave(taps, mask, flip, to);
      else
        interleave_half(taps, static_cast<__mmask32>(mask), _mm512_castsi512_si256(flip), to);
    }
  }
  void (*many)(const char*, const int8_t*, const int32_t*, int32_t*) = nullptr;
  const bool dense = d.dilation == 1, one = d.stride == 1, two = d.stride == 2;
  if (dense && groups == 1 && d.kernel_width == 3)
    many = one ? sum_pixels<1, 3, 1, V, kPixels> : two ? sum_pixels<1, 3, 2, V, kPixels> : nullptr;
  else if (dense && groups == 2 && d.kernel_width == 5)
    many = one ? sum_pixels<2, 5, 1, V, kPixels> : two ? sum_pixels<2, 5, 2, V, kPixels> : nullptr;
  windows<V>(d, e, columns, mask, many);
}

void depthwise(const DepthwiseRow& d, const ConvEpilogue& e) {
  block_width(d.count) == kBlock ? depthwise_block<4>(d, e) : depthwise_block<2>(d, e);
}

}  // namespace

extern const Conv2dInt8Kernel conv2d_int8_avx512 = {16,
                                                    4,
                                                    4,
                                                    {0, 12, 12, 8, 6},
                                                    tile,
                                                    depthwise,
                                                    pack_depthwise,
                                                    depthwise_bytes,
                                                    depthwise_scratch};

}  // namespace narrowcast
