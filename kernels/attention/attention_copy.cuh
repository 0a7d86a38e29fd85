// The memory of attention_tile.cuh: what a block holds of q, k and v, and how it gets there.
#pragma once
#include <type_traits>

#include "attention/attention.h"
#include "common/check.h"
#include "common/vector8.cuh"

namespace narrowcast {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 30;  // of a K/V head: they are counted in int32

// What is int8, a scale for each row; the rest is 16-bit floats.
enum class Codes {
  kNone,
  kCache,  // k and v, widened to 16-bit floats before they are multiplied
  kScores  // q and k, multiplied as they are
};

// kDepth: the head size, rounded up.
template <DType kType_, int kDepth_, int kWarpsM_, int kWarpsK_, Codes kCodes_>
struct AttentionTile {
  static constexpr DType kType = kType_;
  static constexpr int kDepth = kDepth_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr bool kCache = kCodes_ == Codes::kCache, kIntegers = kCodes_ == Codes::kScores;
  static constexpr bool kKeyScales = kCodes_ != Codes::kNone;
  using Factor = std::conditional_t<kIntegers, int8_t, uint16_t>;  // of a score
  static constexpr int kThreads = kWarpsM * kWarpsK * ptx::kWarp, kRows = 16 * kWarpsM;
  static constexpr int kKeys = kCache && kDepth * kWarpsM > 512 ? 32 : 64;  // as memory allows
  static constexpr int kWarpKeys = kKeys / kWarpsK;
  static constexpr int kBlocks = kDepth == 256 ? 1 : kDepth == 128 ? 2 : 3;  // that share an SM

  union Shared {
    struct {
      alignas(128) Factor q[kRows][kDepth];
      alignas(128) Factor k[kKeys][kDepth];
      alignas(128) uint16_t v[kKeys][kDepth];
      alignas(128) int8_t codes[kCache ? kKeys : 1][kCache ? kDepth : 16];
      float key_scale[kKeyScales ? kKeys : 1];
      float row_scale[kIntegers ? kRows : 1], row_back[kIntegers ? kRows : 1];
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

// The element of a row of kDepth T where its 16-byte chunk `chunk` lies.
template <class T, int kDepth>
__device__ __forceinline__ int place(int row, int chunk) {
  constexpr int kRowBytes = kDepth * sizeof(T);
  const int turn = kRowBytes == 32 ? row >> 2 & 1 : kRowBytes == 64 ? row >> 1 & 3 : row & 7;
  return (chunk ^ turn) * static_cast<int>(16 / sizeof(T));
}

// A number read on the device, within 0 .. most.
__device__ __forceinline__ int inside(int v, int64_t most) {
  return v < 0 ? 0 : v > most ? static_cast<int>(most) : v;
}

// Rows of a sequence in a packed tensor, or all `total` of them.
struct Span {
  int64_t first;
  int count;
};
__device__ __forceinline__ Span span_of(const int32_t* cu, int64_t sequence, int64_t total) {
  if (!cu) return {0, static_cast<int>(total)};
  const int first = inside(cu[sequence], total), end = inside(cu[sequence + 1], total);
  return {first, end > first ? end - first : 0};
}

// A sequence and a block of rows in it: number `block` of all. False: there are fewer, for lengths
// are only known here and the grid has blocks to spare. A row of the tensor counts `group` times.
struct BlockPlace {
  int64_t sequence, block, blocks;
  Span rows;
};
__device__ __forceinline__ bool place_block(const int32_t* cu, int64_t batch, int64_t total,
                                            int64_t group, int size, int64_t block,
                                            BlockPlace& place) {
  const auto blocks_of = [&](int count) { return (count * group + size - 1) / size; };
  if (!cu) {
    place.rows = span_of(cu, 0, total), place.blocks = blocks_of(place.rows.count);
    place.sequence = block / place.blocks, place.block = block % place.blocks;
    return true;
  }
  for (int64_t b = 0; b < batch; ++b, block -= place.blocks) {
    place.rows = span_of(cu, b, total), place.blocks = blocks_of(place.rows.count);
    place.sequence = b, place.block = block;
    if (block < place.blocks) return true;
  }
  return false;
}

// The grid for it. Each sequence has at most one block that is not full.
inline int64_t blocks_for(bool packed, int64_t batch, int64_t rows, int size) {
  return packed ? rows / size + batch : (rows + size - 1) / size * batch;
}

// Blocks of the rows of every K/V head.
inline dim3 grid_of_rows(const char* op, const AttentionArgs& a, int size) {
  const int64_t rows = a.sq * (a.heads / a.kv_heads);
  const int64_t blocks = blocks_for(a.cu_q != nullptr, a.batch, rows, size);
  NC_CHECK(blocks <= 0x7fffffff && rows < kMostRows && a.kv_heads <= 65535, op,
           "q must give at most 2^31 blocks of rows and k at most 65535 heads, got ", blocks,
           " and ", a.kv_heads);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(a.kv_heads));
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

// Row `row` of this block in q, nullptr where there is none. G = heads / kv_heads.
__device__ __forceinline__ const uint16_t* query_row(const AttentionArgs& a, const AttentionWork& w,
                                                     int group, int row) {
  if (row >= w.item.rows) return nullptr;
  const int r = static_cast<int>(w.item.row0) + row;
  const int64_t h = w.item.kv_head * group + r % group;
  return static_cast<const uint16_t*>(a.q) + w.item.sequence * a.q_strides.batch +
         h * a.q_strides.head + (w.q0 + r / group) * a.q_strides.row;
}

// The rows of q of this block.
template <class T>
__device__ __forceinline__ void copy_q(typename T::Shared& shared, const AttentionArgs& a,
                                       const AttentionWork& w, int group) {
  constexpr int kChunks = T::kDepth / 8;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < T::kRows; row += T::kThreads / kChunks)
    copy_chunk<2>(&shared.in.q[row][place<uint16_t, T::kDepth>(row, chunk)],
                  query_row(a, w, group, row), chunk * 8, a.depth, w.aligned_q, a.q);
}

// Keys key .. key + kKeys of k, or of v: into its buffer, or into that of codes to be widened.
template <class T, bool kValues>
__device__ __forceinline__ void copy_keys(typename T::Shared& shared, const AttentionArgs& a,
                                          const AttentionWork& w, int key) {
  constexpr int kBytes = T::kCache ? 1 : kValues ? 2 : sizeof(typename T::Factor);
  constexpr int kCount = 16 / kBytes, kChunks = T::kDepth / kCount;
  const int chunk = threadIdx.x % kChunks;
  const AttentionStrides& strides = kValues ? a.v_strides : a.k_strides;
  const void* base = kValues ? a.v : a.k;
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
    if constexpr (T::kCache)
      target = &shared.in.codes[row][chunk * kCount];
    else if constexpr (kValues)
      target = &shared.in.v[row][place<uint16_t, T::kDepth>(row, chunk)];
    else
      target = &shared.in.k[row][place<typename T::Factor, T::kDepth>(row, chunk)];
    copy_chunk<kBytes>(target, source, chunk * kCount, kValues ? a.v_depth : a.depth,
                       kValues ? w.aligned_v : w.aligned_k, base);
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
      ptx::store_shared_128(&to[row][place<uint16_t, T::kDepth>(row, chunk * 2 + part)], wide);
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
