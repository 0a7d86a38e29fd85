// Rows to int8 codes on the device, by the rule of attention_int8.h, and the rows of q of a block.
#pragma once
#include "attention/attention_tile.cuh"
#include "quantize/quantize_device.cuh"

namespace narrowcast {
namespace {

// Values column .. column + 7 of a row of 16-bit floats; zeros behind its end, and without a row.
template <DType kType>
__device__ __forceinline__ void load_eight(const uint16_t* row, int column, int64_t depth,
                                           bool aligned, float (&v)[kVector]) {
#pragma unroll
  for (int e = 0; e < kVector; ++e) v[e] = 0.0f;
  if (!row || column >= depth) return;
  if (aligned)
    load_vector<kType, true>(row, column, depth, v);
  else
    load_vector<kType, false>(row, column, depth, v);
}

// Codes of a row that kLanes neighbours hold, eight values each. Returns the scale: NaN for a row
// that is not finite, whose codes are 0.
template <int kLanes>
__device__ __forceinline__ float row_codes(const float (&v)[kVector], uint32_t (&codes)[2]) {
  uint32_t top = 0;  // bits of magnitudes: those of infinity and NaN are the largest
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const uint32_t bits = ptx::bits_of_float(v[e]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const uint32_t other = ptx::shuffle_xor(top, mask);
    top = other > top ? other : top;
  }
  const bool finite = top < 0x7f800000u;
  const float scale = symmetric_scale(ptx::float_of_bits(top)), inverse = 1.0f / scale;
  codes[0] = codes[1] = 0;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const int32_t code = finite ? rounded(v[e] * inverse) : 0;
    codes[e / 4] |= (static_cast<uint32_t>(code) & 255u) << e % 4 * 8;
  }
  return finite ? scale : NAN;
}

// The rows of q of this block, times a.scale, as codes. `mean`: what the keys lack, or nullptr
// where nothing sees it.
template <class T>
__device__ __forceinline__ void quantize_q(typename T::Shared& shared, const AttentionArgs& a,
                                           const AttentionWork& w, int group, const float* mean) {
  constexpr int kLanes = T::kDepth / kVector, kPerChunk = 16 / kVector;
  const int lane = threadIdx.x % kLanes, column = lane * kVector;
  float lacking[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e)
    lacking[e] = mean && column + e < a.depth ? mean[column + e] : 0.0f;
#pragma unroll 1
  for (int row = threadIdx.x / kLanes; row < T::kRows; row += T::kThreads / kLanes) {
    float v[kVector], back = 0.0f;
    load_eight<T::kType>(query_row(a, w, group, row), column, a.depth, w.aligned_q, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      v[e] = v[e] * a.scale;
      back = back + v[e] * lacking[e];
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) back = back + ptx::shuffle_xor(back, mask);
    uint32_t codes[2];
    const float scale = row_codes<kLanes>(v, codes);
    int8_t* to = &shared.in.q[row][place<int8_t, T::kDepth>(row, lane / kPerChunk)];
    uint32_t* words = reinterpret_cast<uint32_t*>(to + lane % kPerChunk * kVector);
    words[0] = codes[0], words[1] = codes[1];
    if (lane == 0) shared.in.row_scale[row] = scale, shared.in.row_back[row] = back;
  }
}

}  // namespace
}  // namespace narrowcast
