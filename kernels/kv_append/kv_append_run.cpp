// The checks of what start and block_table hold, and the parallel loop: raw pointers, no torch.
#include "kv_append/kv_append.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/check.h"
#include "common/hadamard.h"
#include "common/half.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr const char* kOp = "kv_append";

void check(const KvAppendArgs& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t start = a.start[b], end = start + a.length;
    NC_CHECK(start >= 0 && end <= a.capacity, kOp, "start must lie in 0 .. ", a.capacity - a.length,
             " (capacity ", a.capacity, " less the new tokens), got ", start, " for sequence ", b);
    NC_CHECK(!a.cos || end <= a.table_rows, kOp, "cos must have a row for every position up to ",
             end - 1, ", got ", a.table_rows);
    if (!a.block_table || a.length == 0) continue;
    for (int64_t p = start / a.page_size; p <= (end - 1) / a.page_size; ++p) {
      const int64_t page = a.block_table[b * a.table_stride + p];
      NC_CHECK(page >= 0 && page < a.pages, kOp, "block_table must hold pages 0 .. ", a.pages - 1,
               ", got ", page, " for sequence ", b);
    }
  }
}

const char* element(const void* p, const int64_t strides[3], int64_t x, int64_t y, int64_t z,
                    DType t) {
  return static_cast<const char*>(p) +
         (x * strides[0] + y * strides[1] + z * strides[2]) * element_size(t);
}

void widen(const char* p, DType dtype, int64_t count, float* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, p, count * sizeof(float));
    return;
  }
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  if (dtype == DType::kFloat16)
    for (int64_t i = 0; i < count; ++i) to[i] = from_float16(h[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(h[i]);
}

void turn(const KvAppendArgs& a, int64_t position, float* x) {
  const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
  const int64_t apart = a.interleaved ? 1 : a.half, step = a.interleaved ? 2 : 1;
  for (int64_t i = 0; i < a.half; ++i) {
    float &first = x[i * step], &second = x[i * step + apart];
    const float p = first, q = second;
    first = p * cos[i] - q * sin[i];
    second = q * cos[i] + p * sin[i];
  }
}

void narrow(const float* x, DType dtype, int64_t count, char* to, float* scale) {
  if (dtype == DType::kInt8) {
    QuantizeFindings findings;
    quantize_kernel().row(x, DType::kFloat32, count, false, reinterpret_cast<int8_t*>(to), scale,
                          nullptr, &findings);
    count_nan(findings.nan);
    return;
  }
  uint16_t* h = reinterpret_cast<uint16_t*>(to);
  if (dtype == DType::kFloat32)
    std::memcpy(to, x, count * sizeof(float));
  else if (dtype == DType::kFloat16)
    for (int64_t i = 0; i < count; ++i) h[i] = to_float16(x[i]);
  else
    for (int64_t i = 0; i < count; ++i) h[i] = to_bfloat16(x[i]);
}

constexpr float kShrinks[] = {0.0f, 0.03f, 0.06f, 0.09f, 0.12f};

// 32 values to their codes and grid.
uint32_t narrow_group(const float* x, char* to) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  float low = x[0], high = x[0], best = INFINITY;
  for (int i = 1; i < kNibbleGroup; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
  uint32_t chosen = 0;
  for (const float shrink : kShrinks) {
    const float range = high - low;
    uint32_t pair = static_cast<uint32_t>(to_bfloat16(low + range * shrink * 0.5f)) << 16;
    pair |= to_bfloat16(range * (1.0f - shrink) / 15.0f);
    if (step_of(pair) < 1e-30f) pair = (pair & 0xffff0000u) | 0x3f80u;  // all alike: a step of 1
    const float step = step_of(pair), minimum = minimum_of(pair), inverse = 1.0f / step;
    float error = 0, codes[kNibbleGroup];
    for (int i = 0; i < kNibbleGroup; ++i) {
      const float c = ((x[i] - minimum) * inverse + kRound) - kRound;
      codes[i] = std::min(std::max(c, 0.0f), 15.0f);
      const float d = codes[i] * step + minimum - x[i];
      error += d * d;
    }
    if (error >= best) continue;
    best = error, chosen = pair;
    for (int i = 0; i < 16; ++i)
      to[i] = static_cast<char>(static_cast<int>(codes[i]) | static_cast<int>(codes[i + 16]) << 4);
  }
  return chosen;
}

// A row of floats, which it spoils, to rotated 4-bit codes.
void narrow_nibbles(float* x, int64_t count, char* to, uint32_t* pairs) {
  int64_t nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] != x[i]) x[i] = 0.0f, ++nan;
    x[i] = std::min(std::max(x[i], -1e30f), 1e30f);
  }
  count_nan(nan);
  hadamard(x, count);
  for (int64_t g = 0; g < count / kNibbleGroup; ++g)
    pairs[g] = narrow_group(x + g * kNibbleGroup, to + g * 16);
}

}  // namespace

void kv_append_run(const KvAppendArgs& a) {
  check(a);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(a.depth, 1));
  parallel_for(0, a.batch * a.heads * a.length, grain, [&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(a.depth * static_cast<int64_t>(sizeof(float)));
    float* row = static_cast<float*>(scratch.data());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i % a.length, h = i / a.length % a.heads, b = i / a.length / a.heads;
      const int64_t position = a.start[b] + s;
      int64_t outer = b, slot = position;
      if (a.block_table) {
        outer = a.block_table[b * a.table_stride + position / a.page_size];
        slot = position % a.page_size;
      }
      const auto put = [&](bool values) {
        const DType t = a.cache_dtype;
        const char* from = values ? element(a.v, a.v_strides, b, h, s, a.dtype)
                                  : element(a.k, a.k_strides, b, h, s, a.dtype);
        const char* to = values ? element(a.v_cache, a.v_cache_strides, outer, h, slot, t)
                                : element(a.k_cache, a.k_cache_strides, outer, h, slot, t);
        float* scales = values ? a.v_scale : a.k_scale;
        const int64_t* st = values ? a.v_scale_strides : a.k_scale_strides;
        const int64_t scale_at = outer * st[0] + h * st[1] + slot * st[2];
        float* scale = scales ? scales + scale_at : nullptr;
        widen(from, a.dtype, a.depth, row);
        if (!values && a.cos) turn(a, position, row);
        if (t == DType::kUInt8) {
          if (!values && a.k_shift)
            for (int64_t d = 0; d < a.depth; ++d) row[d] -= a.k_shift[h * a.depth + d];
          return narrow_nibbles(row, a.depth, const_cast<char*>(to),
                                (values ? a.v_pairs : a.k_pairs) + scale_at);
        }
        narrow(row, t, a.depth, const_cast<char*>(to), scale);
      };
      put(false);
      put(true);
    }
  });
}

}  // namespace narrowcast
