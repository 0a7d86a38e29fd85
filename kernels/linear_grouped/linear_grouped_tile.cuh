// linear_grouped by tiles on tensor cores: for more than a few rows of x in 16 bits.
//
// A block computes a tile kM x kN of y. The order of k inside 32 is free as long as x and w agree:
// a lane reads 8 successive codes and the 8 values of x that belong to them, so that no fragment
// needs ldmatrix, and weights are read in the order that plan files hold.
#pragma once
#include "common/mma_tiles.cuh"
#include "common/raster.cuh"
#include "linear_grouped/linear_grouped_scales.cuh"

namespace narrowcast {
namespace {

constexpr int kHalf = 32;  // that are multiplied at once; a group is a number of these

using Large = Tile<128, 128, 2, 4, 3>;
using Medium = Tile<64, 64, 2, 2, 4>;
using Small = Tile<16, 64, 1, 4, 8>;  // few tokens: the bytes of w decide

template <class T, int kBits>
union Shared {
  struct {
    alignas(128) uint16_t x[T::kStages][T::kM][kStep];
    alignas(128) uint8_t w[T::kStages][T::kN][kStep * kBits / 8];
  } ring;
  alignas(128) float y[T::kM][T::kN + 4];  // + 4: neighbouring rows in other banks
};

// Where chunk `chunk` of row `row` lies in its row, so that what eight lanes (x), a warp (4 bits)
// or half a one (8 bits) read at once falls into different banks.
__device__ __forceinline__ int place_x(int row, int chunk) { return chunk ^ (row & 1) << 2; }
template <int kBits>
__device__ __forceinline__ int place_w(int row, int chunk) {
  return kBits == 4 ? chunk ^ (row >> 2 & 1) : chunk ^ (row >> 1 & 1) << 1;
}

// The part of K that a block sums, and where its sums go when it is not all of K.
struct Piece {
  int64_t size;  // a whole number of groups and of steps
  float* partials;
};

// 16 bytes each of rows row0 .. of a matrix, from byte `from` of each row on. What lies past the
// rows or past `end` is zero. kRow: the bytes of a row in `to`; place: (row, chunk) -> chunk.
template <int kRows, int kThreads, int kRow, class Place>
__device__ __forceinline__ void copy_rows(void* to, const void* matrix, int64_t row_bytes,
                                          int64_t rows, int64_t row0, int64_t from, int64_t end,
                                          Place place) {
  constexpr int kChunks = kRow / kChunk;
  const int chunk = threadIdx.x % kChunks;
  const int64_t byte = from + chunk * kChunk;
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < kRows; row += kThreads / kChunks) {
    const bool exists = row0 + row < rows && byte < end;
    const char* source = static_cast<const char*>(matrix);
    ptx::cp_async_16(static_cast<char*>(to) + row * kRow + place(row, chunk) * kChunk,
                     exists ? source + (row0 + row) * row_bytes + byte : source,
                     exists ? kChunk : 0);
  }
}

// Two codes less their centre as 16-bit floats, for both mma steps of 32 k: b[step] as the mma
// takes it. 4 bits: codes 0 4, 1 5, 2 6, 3 7 of the word pair up, for they lie 16 bits apart.
template <DType kType, int kBits>
__device__ __forceinline__ void decode(const void* row, uint32_t (&b)[2][2]) {
  constexpr bool kFloat16 = kType == DType::kFloat16;
  if constexpr (kBits == 4) {
    // An exponent in front of a code makes it 1024 + code in float16, 128 + code in bfloat16.
    constexpr uint32_t kFront = kFloat16 ? 0x64006400u : 0x43004300u;
    constexpr uint32_t kOne = kFloat16 ? 0x3c003c00u : 0x3f803f80u;
    constexpr uint32_t kBack = kFloat16 ? 0xe408e408u : 0xc308c308u;  // -1032, -136
    const uint32_t word = *static_cast<const uint32_t*>(row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t raised = (word >> 4 * i & 0x000f000fu) | kFront;
      b[i / 2][i % 2] =
          kFloat16 ? ptx::fma_f16x2(raised, kOne, kBack) : ptx::fma_bf16x2(raised, kOne, kBack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = static_cast<const uint32_t*>(row)[i] ^ 0x80808080u;  // code + 128
      if constexpr (kFloat16) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          b[i][e] = ptx::fma_f16x2(ptx::permute_bytes(word, 0x64646464u, e ? 0x4342 : 0x4140),
                                   0x3c003c00u, 0xe480e480u);  // less 1152
      } else {
        // bfloat16 has no room behind such an exponent: by way of float32, 2^23 + code + 128.
        uint32_t wide[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          wide[e] = ptx::bits_of_float(
              ptx::float_of_bits(ptx::permute_bytes(word, 0x4b000000u, 0x7550 + e)) - 8388736.0f);
#pragma unroll
        for (int e = 0; e < 2; ++e)
          b[i][e] = ptx::permute_bytes(wide[2 * e], wide[2 * e + 1], 0x7632);
      }
    }
  }
}

// The values of x that belong to those codes, of one row: a[step][0 and 1], by halves of k.
template <int kBits>
__device__ __forceinline__ void order_x(const ptx::Words4& eight, uint32_t (&a)[2][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i / 2][i % 2] = kBits == 4 ? ptx::permute_bytes(eight.word[i / 2], eight.word[i / 2 + 2],
                                                      i % 2 ? 0x7632 : 0x5410)
                                 : eight.word[i];
}

template <DType kType>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (kType == DType::kFloat16)
    ptx::mma_f16(d, a, b);
  else
    ptx::mma_bf16(d, a, b);
}

// The registers of one warp.
template <class T>
struct Accumulators {
  float scale[T::kMmaN][2], offset[T::kMmaN][2];  // of this group; offset of codes less c
  float product[T::kMmaM][T::kMmaN][4] = {};      // of this group
  float x_sum[T::kMmaM][4] = {};                  // the same in all columns
  float sum[T::kMmaM][T::kMmaN][4] = {};

  // Asked for when a group begins: they are there when it ends.
  __device__ __forceinline__ void load_scales(const LinearGroupedArgs& args, int64_t n0,
                                              int64_t group, int lane) {
    const float centre = args.layout.bits == 4 ? 8.0f : 0.0f;
    const bool exists = group < args.layout.k / args.layout.group;
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t n = n0 + j * 8 + lane % 4 * 2 + e;
        const bool inside = exists && n < args.layout.n;
        scale[j][e] = inside ? load_scale(args.layout, args.source.scale, n, group) : 0.0f;
        offset[j][e] = 0.0f;
        if (inside && args.source.offset)
          offset[j][e] =
              load_scale(args.layout, args.source.offset, n, group) + centre * scale[j][e];
      }
  }
  __device__ __forceinline__ void end_group(bool has_offset) {
#pragma unroll
    for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int j = 0; j < T::kMmaN; ++j) {
          float v = product[i][j][r] * scale[j][r % 2];
          if (has_offset) v = v + x_sum[i][r] * offset[j][r % 2];
          sum[i][j][r] = sum[i][j][r] + v;
          product[i][j][r] = 0.0f;
        }
        x_sum[i][r] = 0.0f;
      }
  }
};

// 32 of K for the warp tile; half: which of the two in the buffer.
template <class T, DType kType, int kBits>
__device__ __forceinline__ void multiply(Accumulators<T>& acc, const uint16_t (&x)[T::kM][kStep],
                                         const uint8_t (&w)[T::kN][kStep * kBits / 8], int half,
                                         int warp_m, int warp_n, int lane, bool has_offset) {
  constexpr uint32_t kOnes = kType == DType::kFloat16 ? 0x3c003c00u : 0x3f803f80u;
  const int group = lane / 4, quad = lane % 4;
  uint32_t a[T::kMmaM][2][4];
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int row = warp_m + i * 16 + below * 8 + group;
      const uint16_t* at = x[row] + place_x(row, half * 4 + quad) * (kChunk / 2);
      uint32_t ordered[2][2];
      order_x<kBits>(ptx::load_shared_128(at), ordered);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int e = 0; e < 2; ++e) a[i][step][e * 2 + below] = ordered[step][e];
    }
  const uint32_t ones[2] = {kOnes, kOnes};
#pragma unroll
  for (int j = 0; j < T::kMmaN; ++j) {
    const int row = warp_n + j * 8 + group;
    constexpr int kBytes = kBits;  // of 8 codes
    const int byte = quad * kBytes, chunk = half * (kHalf * kBits / 8 / kChunk) + byte / kChunk;
    uint32_t b[2][2];
    decode<kType, kBits>(w[row] + place_w<kBits>(row, chunk) * kChunk + byte % kChunk, b);
#pragma unroll
    for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
      for (int step = 0; step < 2; ++step)
        multiply_add<kType>(acc.product[i][j], a[i][step], b[step]);
  }
  if (has_offset) {
#pragma unroll
    for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
      for (int step = 0; step < 2; ++step) multiply_add<kType>(acc.x_sum[i], a[i][step], ones);
  }
}

template <class T, DType kType, int kBits>
__global__ void __launch_bounds__(T::kThreads, T::kM == 128 ? 1 : 2)
    linear_grouped_tile(LinearGroupedArgs args, Piece piece) {
  // setup
  Shared<T, kBits>& shared = ptx::shared_memory<Shared<T, kBits>>();
  const GroupedLayout& l = args.layout;
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int warp_m = warp / T::kWarpsN * T::kWarpM, warp_n = warp % T::kWarpsN * T::kWarpN;
  const TileOrigin origin = tile_origin(blockIdx.x, args.m, l.n, T::kM, T::kN);
  const int64_t m0 = origin.row, n0 = origin.column, k0 = blockIdx.y * piece.size;
  const int64_t k1 = l.k - k0 < piece.size ? l.k : k0 + piece.size;
  const int64_t steps = (k1 - k0 + kStep - 1) / kStep;
  const auto load = [&](int64_t step) {
    const int stage = static_cast<int>(step % T::kStages);
    const int64_t k = k0 + step * kStep;
    copy_rows<T::kM, T::kThreads, kStep * 2>(shared.ring.x[stage], args.x, l.k * 2, args.m, m0,
                                             k * 2, k1 * 2, place_x);
    copy_rows<T::kN, T::kThreads, kStep * kBits / 8>(shared.ring.w[stage], args.source.codes,
                                                     l.k * kBits / 8, l.n, n0, k * kBits / 8,
                                                     k1 * kBits / 8, place_w<kBits>);
  };
  const bool has_offset = args.source.offset != nullptr;
  Accumulators<T> acc;
  int64_t group = k0 / l.group, left = l.group;
  acc.load_scales(args, n0 + warp_n, group, lane);

  // load and compute
  through_ring<T::kStages>(steps, load, [&](int64_t step) {
    const int stage = static_cast<int>(step % T::kStages);
#pragma unroll
    for (int half = 0; half < kStep / kHalf; ++half) {
      multiply<T, kType, kBits>(acc, shared.ring.x[stage], shared.ring.w[stage], half, warp_m,
                                warp_n, lane, has_offset);
      left -= kHalf;
      if (left == 0) {
        acc.end_group(has_offset);
        ++group, left = l.group;
        acc.load_scales(args, n0 + warp_n, group, lane);
      }
    }
  });

  // into shared memory
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = warp_m + i * 16 + r / 2 * 8 + lane / 4;
        shared.y[row][warp_n + j * 8 + lane % 4 * 2 + r % 2] = acc.sum[i][j][r];
      }
  ptx::sync_threads();

  // finish and store: neighbouring threads, neighbouring columns
  Epilogue epilogue = args.epilogue;
  if (piece.partials) {
    epilogue = Epilogue{};
    epilogue.out = piece.partials + blockIdx.y * args.m * l.n, epilogue.ld_out = l.n;
  }
  for (int i = threadIdx.x; i < T::kM * (T::kN / 4); i += T::kThreads) {
    const int row = i / (T::kN / 4), column = i % (T::kN / 4) * 4;
    const int64_t m = m0 + row, n = n0 + column, exist = l.n - n;
    if (m >= args.m || exist <= 0) continue;
    float v[4] = {shared.y[row][column], shared.y[row][column + 1], shared.y[row][column + 2],
                  shared.y[row][column + 3]};
    finish_device(epilogue, v, m, n, four_of(exist));
  }
}

constexpr int kSumThreads = 128;

// Adds the sums of the pieces of K, in order, and finishes.
__global__ void __launch_bounds__(kSumThreads)
    linear_grouped_sum(LinearGroupedArgs args, const float* partials, int pieces) {
  const int64_t columns = args.layout.n, across = (columns + 3) / 4;
  const int64_t i = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  const int64_t m = i / across, n = i % across * 4, exist = columns - n;
  if (m >= args.m) return;
  float v[4] = {};
  for (int p = 0; p < pieces; ++p)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < exist) v[e] = v[e] + partials[(p * args.m + m) * columns + n + e];
  finish_device(args.epilogue, v, m, n, four_of(exist));
}

}  // namespace
}  // namespace narrowcast
