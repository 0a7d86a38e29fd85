// linear_grouped for up to 4 rows, and for float32 x: products without tensor cores, bound by the
// bytes of the weights.
#pragma once
#include "common/vector8.cuh"
#include "linear_grouped/linear_grouped_scales.cuh"

namespace narrowcast {
namespace {

// A block computes kRowColumns columns; its warps share K, 16 bytes of codes of each
// column a lane and step, straight from memory.
constexpr int kRowWarps = 4, kRowColumns = 4;

struct RowsShared {
  float sum[kRowWarps][4][kRowColumns];  // of a warp, by row and column
};

// A code behind the exponent of 1 is 1 + code / 16 or 1 + (code + 128) / 256 in float32: one shift
// and one and-or, no subtraction; what it adds to the sum is taken off with S.
template <int kBits>
__device__ __forceinline__ float raised(uint32_t word, int i) {
  constexpr uint32_t kMask = kBits == 4 ? 0x00780000u : 0x007f8000u;
  const int shift = (kBits == 4 ? 19 : 15) - i * kBits;
  const uint32_t bits = shift >= 0 ? word << shift : word >> -shift;
  return ptx::float_of_bits((bits & kMask) | 0x3f800000u);
}

template <DType kType, int kBits, int kRows>
__global__ void __launch_bounds__(kRowWarps* ptx::kWarp, kRows == 1 ? 6 : 3)
    linear_grouped_rows(LinearGroupedArgs args) {
  // setup
  RowsShared& shared = ptx::shared_memory<RowsShared>();
  const GroupedLayout& l = args.layout;
  constexpr int kCodes = 128 / kBits;  // of a lane and column in one step
  constexpr float kUnit = kBits == 4 ? 16.0f : 256.0f, kLift = kBits == 4 ? 24.0f : 384.0f;
  constexpr float kCentre = kBits == 4 ? 8.0f : 0.0f;
  constexpr uint32_t kFlip = kBits == 4 ? 0 : 0x80808080u;
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int64_t across = (l.n + kRowColumns - 1) / kRowColumns;
  const int64_t n0 = blockIdx.x % across * kRowColumns, m0 = blockIdx.x / across * kRows;
  const auto inside = [](int64_t i, int64_t count) { return i < count ? i : count - 1; };
  float sum[kRows][kRowColumns] = {};

  for (int64_t k = threadIdx.x * kCodes; k < l.k; k += kRowWarps * ptx::kWarp * kCodes) {
    uint32_t codes[kRowColumns][4];
#pragma unroll
    for (int c = 0; c < kRowColumns; ++c) {
      const uint8_t* row = args.source.codes + inside(n0 + c, l.n) * (l.k * kBits / 8);
      const ptx::Words4 words = ptx::load_global_128(row + k * kBits / 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[c][i] = words.word[i] ^ kFlip;
    }
    float lifted[kRows][kRowColumns] = {}, x_sum[kRows] = {};
#pragma unroll
    for (int vector = 0; vector < kCodes / kVector; ++vector)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float x[kVector];
        const int64_t at = inside(m0 + r, args.m) * l.k + k + vector * kVector;
        load_vector<kType, true>(args.x, at, kVector, x);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          constexpr int kInWord = 32 / kBits;
          const int word = vector * (kVector / kInWord) + e / kInWord;
          x_sum[r] = x_sum[r] + x[e];
#pragma unroll
          for (int c = 0; c < kRowColumns; ++c)
            lifted[r][c] = lifted[r][c] + x[e] * raised<kBits>(codes[c][word], e % kInWord);
        }
      }
    const int64_t group = k / l.group;
#pragma unroll
    for (int c = 0; c < kRowColumns; ++c) {
      const int64_t n = inside(n0 + c, l.n);
      const float scale = load_scale(l, args.source.scale, n, group);
      const bool has_offset = args.source.offset != nullptr;
      const float offset =
          has_offset ? load_scale(l, args.source.offset, n, group) + kCentre * scale : 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float product = lifted[r][c] * kUnit - x_sum[r] * kLift;
        sum[r][c] = sum[r][c] + product * scale + (has_offset ? x_sum[r] * offset : 0.0f);
      }
    }
  }

  // the lanes, then the warps
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kRowColumns; ++c) {
      float v = sum[r][c];
#pragma unroll
      for (int mask = ptx::kWarp / 2; mask > 0; mask /= 2) v = v + ptx::shuffle_xor(v, mask);
      if (lane == 0) shared.sum[warp][r][c] = v;
    }
  ptx::sync_threads();
  const int row = threadIdx.x;
  if (row >= kRows || m0 + row >= args.m) return;
  float v[4];
#pragma unroll
  for (int c = 0; c < kRowColumns; ++c) {
    v[c] = 0.0f;
#pragma unroll
    for (int other = 0; other < kRowWarps; ++other) v[c] = v[c] + shared.sum[other][row][c];
  }
  const int64_t exist = l.n - n0;
  finish_device(args.epilogue, v, m0 + row, n0, four_of(exist));
}

}  // namespace
}  // namespace narrowcast
