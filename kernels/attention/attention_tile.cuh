// The loop over tiles of keys that attention and attention_decode share, on sm_80 and later.
//
// A block has kRows rows of one K/V head (query r / G of head r % G, see AttentionItem) and passes
// over the keys in tiles of kKeys. Its warps share the rows, 16 each (kWarpsM), and the keys of a
// tile (kWarpsK): where rows are few, each warp has its own running maximum, denominator and sums,
// which are merged at the end. Scores and weights stay in registers, where the layout of a product
// is that of the next product's left operand.
//
// k and v of a tile have one buffer each: v arrives while scores are made, the next k while v is
// weighed. Rows lie with their 16-byte chunks permuted by the row, so that the eight rows of an
// ldmatrix fall into different banks. Codes (int8 caches) arrive in a buffer of their own and are
// widened from there: k exactly, its scale meeting the score; v times its scale. Where q and k are
// codes (attention_int8), their products are exact int32. Scales of keys arrive a tile ahead.
//
// Scores are kept times log2(e); exp2 of what lies behind a mask is 0. v behind a mask must be
// finite all the same, for 0 times it is added.
#pragma once
#include "attention/attention_copy.cuh"
#include "common/epilogue.cuh"

namespace narrowcast {
namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

template <DType kType>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (kType == DType::kFloat16)
    ptx::mma_f16(d, a, b);
  else
    ptx::mma_bf16(d, a, b);
}
template <DType>
__device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  ptx::mma_s8_s8(d, a, b);
}

// Of the four lanes that share a row.
template <class Combine>
__device__ __forceinline__ float over_quad(float v, Combine combine) {
  v = combine(v, ptx::shuffle_xor(v, 1));
  return combine(v, ptx::shuffle_xor(v, 2));
}

// The two rows of a lane: which keys they see, and how far they are. Codes: a row's scale, and its
// product with what the keys lack.
struct RowPair {
  int first[2], last[2];
  float scale[2], back[2];
  float top[2], total[2];  // total: of this lane's columns
  int64_t bias[2];
};

// q k^T of the warp's rows and keys, added to s.
template <class T, class Sum>
__device__ __forceinline__ void add_products(const typename T::Shared& shared, int warp_row,
                                             int warp_key, int lane,
                                             Sum (&s)[T::kWarpKeys / 8][4]) {
  using Factor = typename T::Factor;
#pragma unroll
  for (int d = 0; d < T::kDepth * static_cast<int>(sizeof(Factor)) / 32; ++d) {
    uint32_t q[4];
    const int row = warp_row + lane % 16;
    ptx::ldmatrix_x4(q, &shared.in.q[row][place<Factor, T::kDepth>(row, d * 2 + lane / 16)]);
#pragma unroll
    for (int j = 0; j < T::kWarpKeys / 16; ++j) {
      uint32_t k[4];
      const int key = warp_key + j * 16 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(k, &shared.in.k[key][place<Factor, T::kDepth>(key, d * 2 + lane / 8 % 2)]);
      mma<T::kType>(s[j * 2], q, k[0], k[1]);
      mma<T::kType>(s[j * 2 + 1], q, k[2], k[3]);
    }
  }
}

template <class T>
__device__ __forceinline__ void make_scores(const typename T::Shared& shared, int warp_row,
                                            int warp_key, int lane,
                                            float (&s)[T::kWarpKeys / 8][4]) {
  if constexpr (T::kIntegers) {
    // 127 * 127 * 256 < 2^22: sums that begin with the bits of 1.5 * 2^23 end as those of a float.
    int32_t sums[T::kWarpKeys / 8][4];
#pragma unroll
    for (int j = 0; j < T::kWarpKeys / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[j][r] = 0x4b400000;
    add_products<T>(shared, warp_row, warp_key, lane, sums);
#pragma unroll
    for (int j = 0; j < T::kWarpKeys / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        s[j][r] = ptx::float_of_bits(static_cast<uint32_t>(sums[j][r])) - 12582912.0f;
  } else {
    add_products<T>(shared, warp_row, warp_key, lane, s);
  }
}

// Scores to weights: scale, cap, bias, mask, and the running maximum of each row. `key`: the first
// of the warp, which is warp_key of the tile. Returns what the sums so far are multiplied with.
template <class T>
__device__ __forceinline__ void weigh(const typename T::Shared& shared, const AttentionArgs& a,
                                      RowPair& rows, int key, int warp_key, int lane,
                                      float (&s)[T::kWarpKeys / 8][4], float (&keep)[2]) {
  constexpr float kNone = -INFINITY;
  if constexpr (T::kKeyScales) {
#pragma unroll
    for (int j = 0; j < T::kWarpKeys / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        s[j][r] = s[j][r] * shared.in.key_scale[warp_key + j * 8 + lane % 4 * 2 + r % 2];
  }
  const bool plain = a.softcap == 0.0f && !a.bias;
  const float unit = plain ? kLog2E : 1.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = (T::kIntegers ? rows.scale[half] : a.scale) * unit;
    const bool all = key >= rows.first[half] && key + T::kWarpKeys <= rows.last[half];
    float peak = rows.top[half];
#pragma unroll
    for (int j = 0; j < T::kWarpKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[j][half * 2 + e];
        const int at = key + j * 8 + lane % 4 * 2 + e;
        if constexpr (T::kIntegers)
          x = fmaf(x, scale, rows.back[half] * unit);
        else
          x = x * scale;
        const bool seen = all || (at >= rows.first[half] && at < rows.last[half]);
        if (!plain) {
          if (a.softcap > 0.0f) x = a.softcap * tanhf(x / a.softcap);
          if (a.bias && seen)
            x = x +
                load_float_device(a.bias, rows.bias[half] + at * a.bias_strides[3], a.bias_dtype);
          x = x * kLog2E;
        }
        if (!seen) x = kNone;
        peak = x > peak ? x : peak;
      }
    peak = over_quad(peak, [](float x, float y) { return y > x ? y : x; });
    const float base = peak == kNone ? 0.0f : peak;
    keep[half] = exp2f(rows.top[half] - base);
    rows.top[half] = peak;
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < T::kWarpKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[j][half * 2 + e];
        x = exp2f(x - base);
        total = total + x;
      }
    rows.total[half] = rows.total[half] * keep[half] + total;
  }
}

// sums = sums * keep + weights v, of the warp's keys.
template <class T>
__device__ __forceinline__ void add_values(const typename T::Shared& shared, int warp_key, int lane,
                                           const float (&s)[T::kWarpKeys / 8][4],
                                           const float (&keep)[2],
                                           float (&sums)[T::kDepth / 8][4]) {
#pragma unroll
  for (int c = 0; c < T::kDepth / 8; ++c)
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[c][r] = sums[c][r] * keep[r / 2];
#pragma unroll
  for (int j = 0; j < T::kWarpKeys / 16; ++j) {
    uint32_t p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[i] = pack_halves<T::kType>(s[j * 2 + i / 2][i % 2 * 2], s[j * 2 + i / 2][i % 2 * 2 + 1]);
    const int key = warp_key + j * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int c = 0; c < T::kDepth / 16; ++c) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v,
                             &shared.in.v[key][place<uint16_t, T::kDepth>(key, c * 2 + lane / 16)]);
      mma<T::kType>(sums[c * 2], p, v[0], v[1]);
      mma<T::kType>(sums[c * 2 + 1], p, v[2], v[3]);
    }
  }
}

// What the warps found, merged: out and lse, or the partial result.
template <class T>
__device__ __forceinline__ void store_rows(const typename T::Shared& shared, const AttentionArgs& a,
                                           const AttentionWork& w, int group) {
  constexpr int kVectors = T::kDepth / kVector;
  for (int i = threadIdx.x; i < T::kRows * kVectors; i += T::kThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector;
    if (row >= w.item.rows || (column >= a.v_depth && column > 0)) continue;
    float top = -INFINITY, total = 0.0f;
    float v[kVector] = {};
#pragma unroll
    for (int part = 0; part < T::kWarpsK; ++part) {
      const float other = shared.out.top[part][row];
      top = other > top ? other : top;
    }
    const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int part = 0; part < T::kWarpsK; ++part) {
      const float share = shared.out.total[part][row];
      if (share == 0.0f) continue;  // saw nothing
      const float weight = exp2f(shared.out.top[part][row] - base);
      total = total + share * weight;
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        v[e] = v[e] + shared.out.sum[part][row][column + e] * weight;
    }
    if (w.item.partial) {
      float* to = w.item.partial + row * (a.v_depth + 2);
      if (column == 0) to[0] = top, to[1] = total;
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (column + e < a.v_depth) to[column + e + 2] = v[e];
      continue;
    }
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = v[e] * factor;
    const int r = static_cast<int>(w.item.row0) + row;
    const int64_t h = w.item.kv_head * group + r % group;
    const int64_t query = w.q0 + r / group;
    uint16_t* out = static_cast<uint16_t*>(a.out) + w.item.sequence * a.out_strides.batch +
                    h * a.out_strides.head + query * a.out_strides.row;
    if (w.aligned_out)
      store_vector<T::kType, true>(out, column, a.v_depth, v);
    else
      store_vector<T::kType, false>(out, column, a.v_depth, v);
    if (a.lse && column == 0)
      a.lse[w.item.sequence * a.lse_strides.batch + h * a.lse_strides.head +
            query * a.lse_strides.row] = total == 0.0f ? -INFINITY : top * kLn2 + logf(total);
  }
}

// The block's work where it has kRows of the rows of one K/V head and all the keys; false: none.
template <class T>
__device__ __forceinline__ bool place_rows(const AttentionArgs& a, AttentionWork& w) {
  const int64_t group = a.heads / a.kv_heads;
  BlockPlace place;
  if (!place_block(a.cu_q, a.batch, a.sq, group, T::kRows, blockIdx.x, place)) return false;
  const Span keys = span_of(a.cu_k, place.sequence, a.sk);
  w.q0 = place.rows.first, w.sq = place.rows.count, w.k0 = keys.first, w.sk = keys.count;
  w.item.kv_head = blockIdx.y, w.item.sequence = place.sequence;
  w.item.row0 = (place.blocks - 1 - place.block) * T::kRows;  // causal: the last rows see most
  const int64_t left = w.sq * group - w.item.row0;
  w.item.rows = left < T::kRows ? left : T::kRows;
  w.item.key1 = w.sk;
  return true;
}

// load_q(shared, group): the rows of q, by asynchronous copies or at once.
template <class T, class LoadQ>
__device__ __forceinline__ void attention_block(const AttentionArgs& a, const AttentionWork& w,
                                                const LoadQ& load_q) {
  // setup
  typename T::Shared& shared = ptx::shared_memory<typename T::Shared>();
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int part = warp % T::kWarpsK, warp_row = warp / T::kWarpsK * 16;
  const int warp_key = part * T::kWarpKeys;
  const int group = static_cast<int>(a.heads / a.kv_heads), apart = w.sk - w.sq;
  const int window = static_cast<int>(a.window);
  const auto first_of = [&](int query) {
    const int low = a.window ? query + apart - window + 1 : 0;
    return low > w.item.key0 ? low : static_cast<int>(w.item.key0);
  };
  const auto last_of = [&](int query) {
    const int high = a.causal ? query + apart + 1 : a.window ? query + apart + window : w.sk;
    return high < w.item.key1 ? high : static_cast<int>(w.item.key1);
  };
  RowPair rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    const int r = static_cast<int>(w.item.row0) + row;
    const int64_t h = w.item.kv_head * group + r % group;
    const int query = r / group;
    const bool exists = row < w.item.rows;
    rows.first[half] = exists ? first_of(query) : 0;
    rows.last[half] = exists ? last_of(query) : 0;
    rows.top[half] = -INFINITY, rows.total[half] = 0.0f;
    if (exists && a.sinks && part == 0 && !w.item.partial && a.sinks[h] != -INFINITY) {
      rows.top[half] = a.sinks[h] * kLog2E;
      rows.total[half] = lane % 4 == 0 ? 1.0f : 0.0f;
    }
    rows.bias[half] =
        w.item.sequence * a.bias_strides[0] + h * a.bias_strides[1] + query * a.bias_strides[2];
  }
  const int begin = first_of(static_cast<int>(w.item.row0) / group);
  const int end = last_of(static_cast<int>(w.item.row0 + w.item.rows - 1) / group);
  float sums[T::kDepth / 8][4] = {};

  const int mine = threadIdx.x;  // a key of a tile, whose scale this thread brings
  const bool brings = T::kKeyScales && mine < T::kKeys;
  const auto scale_from = [&](int key) {
    return brings ? key_scale(a, w, a.k_scale, a.k_scale_strides, key + mine) : 0.0f;
  };

  // load and compute
  if (begin < end) {
    copy_keys<T, false>(shared, a, w, begin);
    load_q(shared, group);
    ptx::cp_async_commit();
    if (brings) shared.in.key_scale[mine] = scale_from(begin);
    if constexpr (T::kIntegers) {
      ptx::sync_threads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.scale[half] = shared.in.row_scale[warp_row + half * 8 + lane / 4];
        rows.back[half] = shared.in.row_back[warp_row + half * 8 + lane / 4];
      }
    }
  }
  for (int key = begin; key < end; key += T::kKeys) {
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // k is there; v and the codes are no longer read
    if constexpr (T::kCache) {
      widen<T>(shared, shared.in.k, false, a, w, key);
      ptx::sync_threads();
    }
    copy_keys<T, true>(shared, a, w, key);
    ptx::cp_async_commit();
    float s[T::kWarpKeys / 8][4] = {}, keep[2];
    make_scores<T>(shared, warp_row, warp_key, lane, s);
    weigh<T>(shared, a, rows, key + warp_key, warp_key, lane, s, keep);
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // v is there; k and its scales are no longer read
    if constexpr (T::kCache) {
      widen<T>(shared, shared.in.v, true, a, w, key);
      ptx::sync_threads();
    }
    if (key + T::kKeys < end) copy_keys<T, false>(shared, a, w, key + T::kKeys);
    ptx::cp_async_commit();
    const float next = scale_from(key + T::kKeys);
    add_values<T>(shared, warp_key, lane, s, keep, sums);
    if (brings) shared.in.key_scale[mine] = next;
  }

  // merge and store
  ptx::sync_threads();  // q, k and v are no longer read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    const float total = over_quad(rows.total[half], [](float x, float y) { return x + y; });
    if (lane % 4 == 0) {
      shared.out.top[part][row] = rows.top[half];
      shared.out.total[part][row] = total;
    }
#pragma unroll
    for (int c = 0; c < T::kDepth / 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        shared.out.sum[part][row][c * 8 + lane % 4 * 2 + e] = sums[c][half * 2 + e];
  }
  ptx::sync_threads();
  store_rows<T>(shared, a, w, group);
}

}  // namespace
}  // namespace narrowcast
