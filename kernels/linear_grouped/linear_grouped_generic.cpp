// linear_grouped, portable: the contract written out, 16 rows of W side by side.
#include "linear_grouped/linear_grouped_rows.h"

namespace narrowcast {
namespace {

void load16(const GroupedLayout& l, const uint8_t* p, int64_t block, float* to) {
  if (l.half)
    for (int j = 0; j < 16; ++j)
      to[j] = from_float16(reinterpret_cast<const uint16_t*>(p)[block * 16 + j]);
  else
    memcpy(to, p + block * 64, 64);
}

uint32_t dword(const uint8_t* p) {
  uint32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Upper bytes of x, and lower ones where there are any.
void panel_integer(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, bool lower,
                   float* acc, int64_t ld) {
  const uint8_t* scales = panel + l.code_bytes;
  const int64_t blocks = l.k / l.block, step = l.bits == 4 ? 8 : 4;
  for (int m = 0; m < x.ld; ++m) {
    float y[16] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      int32_t sum[16];
      for (int j = 0; j < 16; ++j) sum[j] = x.start[b * x.ld + m];
      for (int64_t k = b * l.block; k < (b + 1) * l.block; k += step) {
        const uint8_t* codes = panel + k / step * 64;
        const int64_t at = k * x.ld + 4 * m;
        int32_t xq[8];
        for (int i = 0; i < step; ++i) {
          const int64_t from = at + i / 4 * 4 * x.ld + i % 4;
          xq[i] = lower ? x.xq[from] * 256 + x.xl[from] : x.xq[from];
        }
        for (int j = 0; j < 16; ++j) {
          const uint32_t v = dword(codes + 4 * j);
          for (int i = 0; i < 4; ++i) {
            const int byte = static_cast<int>(v >> (8 * i) & 255);
            sum[j] += l.bits == 8 ? byte * xq[i] : (byte & 15) * xq[i] + (byte >> 4) * xq[4 + i];
          }
        }
      }
      float scale[16], offset[16];
      load16(l, scales, b, scale);
      for (int j = 0; j < 16; ++j) {
        const float term = scale[j] * static_cast<float>(sum[j]);
        y[j] += lower ? term : x.xs[b * x.ld + m] * term;
      }
      if (!l.has_offset) continue;
      load16(l, scales + l.scale_bytes, b, offset);
      const float centre = l.bits == 4 ? 8.0f : 0.0f;
      for (int j = 0; j < 16; ++j) y[j] += (offset[j] + centre * scale[j]) * x.xsum[b * x.ld + m];
    }
    if (lower)
      for (int j = 0; j < 16; ++j) y[j] *= x.xs[m];
    memcpy(acc + m * ld, y, sizeof y);
  }
}

void panel8(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, float* acc,
            int64_t ld) {
  panel_integer(l, panel, x, false, acc, ld);
}

void panel16(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, float* acc,
             int64_t ld) {
  panel_integer(l, panel, x, true, acc, ld);
}

void panel32(const GroupedLayout& l, const uint8_t* panel, const GroupedTile& x, float* acc,
             int64_t ld) {
  const uint8_t* scales = panel + l.code_bytes;
  const int64_t blocks = l.k / l.block, step = l.bits == 4 ? 8 : 4;
  for (int m = 0; m < x.ld; ++m) {
    float y[16] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      float sum[16] = {};
      for (int64_t k = b * l.block; k < (b + 1) * l.block; k += step) {
        const uint8_t* codes = panel + k / step * 64;
        for (int j = 0; j < 16; ++j) {
          const uint32_t v = dword(codes + 4 * j);
          for (int i = 0; i < step; ++i) {
            const int q = l.bits == 4 ? static_cast<int>(v >> (4 * i) & 15) - 8
                                      : static_cast<int>(v >> (8 * i) & 255) - 128;
            sum[j] += static_cast<float>(q) * x.x[(k + i) * x.ld + m];
          }
        }
      }
      float scale[16], offset[16];
      load16(l, scales, b, scale);
      for (int j = 0; j < 16; ++j) y[j] += scale[j] * sum[j];
      if (!l.has_offset) continue;
      load16(l, scales + l.scale_bytes, b, offset);
      const float centre = l.bits == 4 ? 8.0f : 0.0f;
      for (int j = 0; j < 16; ++j) y[j] += (offset[j] + centre * scale[j]) * x.xsum[b * x.ld + m];
    }
    memcpy(acc + m * ld, y, sizeof y);
  }
}

void finish_columns(const Epilogue& e, const float* acc, int64_t m, int64_t n, int64_t count) {
  for (int64_t i = 0; i < count; ++i) finish(e, acc[i], m, n + i);
}

}  // namespace

extern const GroupedKernels linear_grouped_generic = {panel8,    panel16,   panel32,       prepare8,
                                                      prepare16, prepare32, nullptr,       nullptr,
                                                      nullptr,   pack_rows, finish_columns};

}  // namespace narrowcast
