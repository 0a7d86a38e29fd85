// int8 operands of a product on tensor cores (linear_int8, conv2d_int8): from memory into a buffer
// of the ring, and from there into fragments.
#pragma once
#include "common/mma_tiles.cuh"

namespace narrowcast {

constexpr int kMmaDepth = 32;            // values that one mma multiplies
constexpr int kChunks = kStep / kChunk;  // of a row in a buffer

// Where chunk `chunk` of row `row` of an int8 operand lies in its row: permuted, so that the eight
// rows of an ldmatrix fall into different banks.
__device__ __forceinline__ int place(int row, int chunk) {
  return (chunk ^ (row >> 1 & 3)) * kChunk;
}

// The first `count` of 16 bytes that lie anywhere; the rest is zero.
__device__ __forceinline__ ptx::Words4 load_bytes(const void* from, int64_t count) {
  const uint8_t* source = static_cast<const uint8_t*>(from);
  ptx::Words4 words = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < count) words.word[i / 4] |= static_cast<uint32_t>(source[i]) << i % 4 * 8;
  return words;
}

// An int8 matrix; rows past `rows` and columns past `depth` read as zeros.
struct Source {
  const int8_t* data;
  int64_t ld, rows, depth;
};

// kRows rows from row0 on, columns k0 .. k0 + kStep. kAligned: rows begin at multiples of 16 bytes.
template <int kRows, int kThreads, bool kAligned>
__device__ __forceinline__ void copy_rows(int8_t (&to)[kRows][kStep], const Source& from,
                                          int64_t row0, int64_t k0) {
  static_assert(kThreads % kChunks == 0, "a thread keeps its chunk of a row");
  const int chunk = threadIdx.x % kChunks;
  const int64_t k = k0 + chunk * kChunk, left = from.depth - k;
  const int exist = left <= 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < kRows; row += kThreads / kChunks) {
    const int bytes = row0 + row < from.rows ? exist : 0;
    const int8_t* source = bytes ? from.data + (row0 + row) * from.ld + k : from.data;
    int8_t* target = &to[row][place(row, chunk)];
    if constexpr (kAligned)
      ptx::cp_async_16(target, source, bytes);
    else
      ptx::store_shared_128(target, load_bytes(source, bytes));
  }
}

// Operands of one mma depth of the warp tile: x as a, w as b.
template <class T>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[T::kMmaM][4],
                                               uint32_t (&b)[T::kMmaN][2],
                                               const int8_t (&x)[T::kM][kStep],
                                               const int8_t (&w)[T::kN][kStep], int chunk0,
                                               int warp_m, int warp_n, int lane) {
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i) {
    const int row = warp_m + i * 16 + lane % 16;
    ptx::ldmatrix_x4(a[i], &x[row][place(row, chunk0 + lane / 16)]);
  }
#pragma unroll
  for (int j = 0; j < T::kMmaN; j += 2) {
    const int row = warp_n + j * 8 + lane / 16 * 8 + lane % 8;
    uint32_t two[4];
    ptx::ldmatrix_x4(two, &w[row][place(row, chunk0 + lane / 8 % 2)]);
    b[j][0] = two[0], b[j][1] = two[1];
    b[j + 1][0] = two[2], b[j + 1][1] = two[3];
  }
}

}  // namespace narrowcast
