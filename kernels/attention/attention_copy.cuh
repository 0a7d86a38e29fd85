// The memory of attention_tile.cuh: what a block holds of q, k and v, and how it gets there.
#pragma once
#include "attention/attention.h"
#include "common/vector8.cuh"

namespace narrowcast {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 30;  // of a K/V head: they are counted in int32

// kDepth: the head size, rounded up.
template <DType kType_, int kDepth_, int kWarpsM_, int kWarpsK_, bool kInt8_>
struct AttentionTile {
  static constexpr DType kType = kType_;
  static constexpr int kDepth = kDepth_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr bool kInt8 = kInt8_;
  static constexpr int kThreads = kWarpsM * kWarpsK * ptx::kWarp, kRows = 16 * kWarpsM;
  static constexpr int kKeys = kInt8 && kDepth * kWarpsM > 512 ? 32 : 64;  // as memory allows
  static constexpr int kWarpKeys = kKeys / kWarpsK;
  static constexpr int kBlocks = kDepth == 256 ? 1 : kDepth == 128 ? 2 : 3;  // that share an SM

  union Shared {
    struct {
      alignas(128) uint16_t q[kRows][kDepth];
      alignas(128) uint16_t k[kKeys][kDepth];
      alignas(128) uint16_t v[kKeys][kDepth];
      alignas(128) int8_t codes[kInt8 ? kKeys : 1][kInt8 ? kDepth : 16];
    } in;
    struct {
      alignas(128) float sum[kWarpsK][kRows][kDepth + 4];  // + 4: neighbouring rows in other banks
      float top[kWarpsK][kRows], total[kWarpsK][kRows];
    } out;
  };
  static_assert(sizeof(Shared) <= 99 * 1024, "sm_86 has 99 KB a block");
};

// An item and its sequence: first rows in q and k, numbers of queries and keys. pages: how many
// exist. aligned: rows of k and v can be copied 16 bytes at a time; likewise of q and out.
struct AttentionWork {
  AttentionItem item;
  int64_t q0, k0, pages;
  int sq, sk;
  bool aligned_q, aligned_k, aligned_v, aligned_out;
};

// Where 16-byte chunk `chunk` of row `row` lies in its row.
template <int kDepth>
__device__ __forceinline__ int place(int row, int chunk) {
  return kDepth == 32 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7);
}

// A number read on the device, within 0 .. most.
__device__ __forceinline__ int inside(int v, int64_t most) {
  return v < 0 ? 0 : v > most ? static_cast<int>(most) : v;
}

// The page, or the sequence, of a row of k or v, and the row in it.
struct CacheRow {
  int64_t outer, row;
};
__device__ __forceinline__ CacheRow cache_row(const AttentionArgs& a, const AttentionWork& w,
                                              int key) {
  if (!a.block_table) return {w.item.sequence, w.k0 + key};
  const int size = static_cast<int>(a.page_size);
  const int64_t page = a.block_table[w.item.sequence * a.table_stride + key / size];
  return {page < 0 || page >= w.pages ? 0 : page, key % size};
}

// 16 bytes of a row of `depth` elements of kBytes each, from element `from` on; `row` nullptr:
// zeros.
template <int kBytes>
__device__ __forceinline__ void copy_chunk(void* to, const void* row, int64_t from, int64_t depth,
                                           bool aligned, const void* somewhere) {
  constexpr int kCount = 16 / kBytes;
  const int64_t left = row ? depth - from : 0;
  const char* source = static_cast<const char*>(row) + from * kBytes;
  if (aligned) {
    const int bytes = left > 0 ? 16 : 0;
    ptx::cp_async_16(to, bytes ? source : somewhere, bytes);
  } else {
    ptx::Words4 words = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < left) {
        const uint32_t bits = kBytes == 2 ? reinterpret_cast<const uint16_t*>(source)[i]
                                          : reinterpret_cast<const uint8_t*>(source)[i];
        words.word[i * kBytes / 4] |= bits << i * kBytes % 4 * 8;
      }
    ptx::store_shared_128(to, words);
  }
}

// The rows of q of this block. G = heads / kv_heads.
template <class T>
__device__ __forceinline__ void copy_q(typename T::Shared& shared, const AttentionArgs& a,
                                       const AttentionWork& w, int group) {
  constexpr int kChunks = T::kDepth / 8;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < T::kRows; row += T::kThreads / kChunks) {
    const uint16_t* source = nullptr;
    if (row < w.item.rows) {
      const int r = static_cast<int>(w.item.row0) + row;
      const int64_t h = w.item.kv_head * group + r % group;
      source = static_cast<const uint16_t*>(a.q) + w.item.sequence * a.q_strides.batch +
               h * a.q_strides.head + (w.q0 + r / group) * a.q_strides.row;
    }
    copy_chunk<2>(&shared.in.q[row][place<T::kDepth>(row, chunk) * 8], source, chunk * 8, a.depth,
                  w.aligned_q, a.q);
  }
}

// Keys key .. key + kKeys of k or v, into `to` or, where they are codes, into the codes' buffer.
template <class T>
__device__ __forceinline__ void copy_keys(typename T::Shared& shared,
                                          uint16_t (&to)[T::kKeys][T::kDepth], bool values,
                                          const AttentionArgs& a, const AttentionWork& w, int key) {
  constexpr int kBytes = T::kInt8 ? 1 : 2, kCount = 16 / kBytes, kChunks = T::kDepth / kCount;
  const int chunk = threadIdx.x % kChunks;
  const AttentionStrides& strides = values ? a.v_strides : a.k_strides;
  const void* base = values ? a.v : a.k;
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < T::kKeys; row += T::kThreads / kChunks) {
    const char* source = nullptr;
    if (key + row < w.sk) {
      const CacheRow at = cache_row(a, w, key + row);
      source = static_cast<const char*>(base) +
               (at.outer * strides.batch + w.item.kv_head * strides.head + at.row * strides.row) *
                   kBytes;
    }
    void* target;
    if constexpr (T::kInt8)
      target = &shared.in.codes[row][chunk * kCount];
    else
      target = &to[row][place<T::kDepth>(row, chunk) * kCount];
    copy_chunk<kBytes>(target, source, chunk * kCount, values ? a.v_depth : a.depth,
                       values ? w.aligned_v : w.aligned_k, base);
  }
}

__device__ __forceinline__ float key_scale(const AttentionArgs& a, const AttentionWork& w,
                                           const float* scales, const AttentionStrides& strides,
                                           int key) {
  if (key >= w.sk) return 0.0f;
  const CacheRow at = cache_row(a, w, key);
  return scales[at.outer * strides.batch + w.item.kv_head * strides.head + at.row * strides.row];
}

template <DType kType>
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  return kType == DType::kFloat16 ? ptx::pack_f16x2(low, high) : ptx::pack_bf16x2(low, high);
}

// The codes of a tile as 16-bit floats: as they are (k), or times their scales (v).
template <class T>
__device__ __forceinline__ void widen(typename T::Shared& shared,
                                      uint16_t (&to)[T::kKeys][T::kDepth], bool values,
                                      const AttentionArgs& a, const AttentionWork& w, int key) {
  constexpr int kChunks = T::kDepth / 16;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll 1
  for (int row = threadIdx.x / kChunks; row < T::kKeys; row += T::kThreads / kChunks) {
    const float scale = values ? key_scale(a, w, a.v_scale, a.v_scale_strides, key + row) : 1.0f;
    const ptx::Words4 codes = ptx::load_shared_128(&shared.in.codes[row][chunk * 16]);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      ptx::Words4 wide;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = codes.word[part * 2 + i / 2] ^ 0x80808080u;  // code + 128
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)  // behind an exponent: 2^23 + code + 128
          v[e] =
              (ptx::float_of_bits(ptx::permute_bytes(word, 0x4b000000u, 0x7550 + i % 2 * 2 + e)) -
               8388736.0f) *
              scale;
        wide.word[i] = pack_halves<T::kType>(v[0], v[1]);
      }
      ptx::store_shared_128(&to[row][place<T::kDepth>(row, chunk * 2 + part) * 8], wide);
    }
  }
}

// Whether rows of a tensor can be moved 16 bytes at a time.
inline bool even_rows(const void* p, const AttentionStrides& strides, int64_t depth,
                      int64_t bytes) {
  return is_aligned(p, 16) && strides.batch * bytes % 16 == 0 && strides.head * bytes % 16 == 0 &&
         strides.row * bytes % 16 == 0 && depth * bytes % 16 == 0;
}

}  // namespace
}  // namespace narrowcast
