// attention_int8 on sm_80 and later: scores by int8 tensor cores (mma m16n8k32), the rest as in
// attention.
//
//   s_ij = qs_i * ks_j * (q^_i . k^_j) from codes of q and of k less its mean: see
//   attention_int8.h; the loop, masks, softmax and sums over v are attention/attention_tile.cuh.
//
// Work: three kernels. key_sums adds up kPieces pieces of the keys of a sequence and head, which
// key_codes makes a mean of before it writes the codes of 64 keys; the pieces depend on the
// sequence's own length only. attention_int8_rows has blocks of 64 rows of one K/V head, makes the
// codes of its rows of q as it starts, and passes over the keys.
// Numerics: scores exact in int32, then float32; the weights are rounded to the 16 bits of v for
// the second product. The mean is a sum of pieces, which may differ from the CPU's in its last bit.
// Cost: 2 Sq Sk D operations in int8 and 2 Sq Sk Dv in 16 bits a head, half of it where causal; k
// is read twice and its codes written once; codes and v are read once per 64 rows.
//
// GATE attention_int8_rows: spills = 0, contains IMMA.16832.S8.S8 HMMA.16816.F32 LDSM.16.M88.4
// GATE attention_int8_rows: contains LDSM.16.MT88.4 MUFU.EX2 LDGSTS.E.BYPASS.128
// GATE attention_int8_rows.*Li(32|64)E: registers <= 168
// GATE attention_int8_rows.*Li(128|256)E: registers <= 255
// GATE key_(sums|codes): spills = 0, registers <= 64, contains LDG.E.128
// GATE block: shared <= 99000
#include "attention_int8/attention_int8_codes.cuh"
#include "attention_int8/attention_int8_cuda.h"

namespace narrowcast {
namespace {

constexpr int kPieces = 16;    // of the keys of a sequence, added up apart
constexpr int kKeyBlock = 64;  // keys of a block of key_codes
constexpr int kKeyThreads = 128;

template <DType kType, int kDepth>
using Int8Tile = AttentionTile<kType, kDepth, 4, 1, Codes::kScores>;

// How the threads of a block share keys: kLanes a key, kKeys of them at once.
template <int kDepth>
struct KeyThreads {
  static constexpr int kLanes = kDepth / kVector, kKeys = kKeyThreads / kLanes;
};
template <int kDepth>
struct SumShared {
  float sum[KeyThreads<kDepth>::kKeys][kDepth];
};
template <int kDepth>
struct CodeShared {
  float mean[kDepth];
};

__device__ __forceinline__ const uint16_t* key_row(const AttentionArgs& a, int64_t sequence,
                                                   int64_t kv_head, int64_t row) {
  return static_cast<const uint16_t*>(a.k) + sequence * a.k_strides.batch +
         kv_head * a.k_strides.head + row * a.k_strides.row;
}

// sums [b][h][kPieces][D], of the finite keys.
template <DType kType, int kDepth>
__global__ void __launch_bounds__(kKeyThreads)
    key_sums(AttentionArgs a, AttentionInt8Workspace s, bool aligned) {
  using Threads = KeyThreads<kDepth>;
  SumShared<kDepth>& shared = ptx::shared_memory<SumShared<kDepth>>();
  const int64_t sequence = blockIdx.x / kPieces, kv_head = blockIdx.y;
  const int piece = blockIdx.x % kPieces, mine = threadIdx.x / Threads::kLanes;
  const int column = threadIdx.x % Threads::kLanes * kVector;
  const Span keys = span_of(a.cu_k, sequence, a.sk);
  float sum[kVector] = {};
  for (int key = piece * Threads::kKeys + mine; key < keys.count; key += kPieces * Threads::kKeys) {
    float v[kVector];
    load_eight<kType>(key_row(a, sequence, kv_head, keys.first + key), column, a.depth, aligned, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (is_finite(v[e])) sum[e] = sum[e] + v[e];
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) shared.sum[mine][column + e] = sum[e];
  ptx::sync_threads();
  float* to = s.sums + ((sequence * a.kv_heads + kv_head) * kPieces + piece) * a.depth;
  for (int d = threadIdx.x; d < a.depth; d += kKeyThreads) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < Threads::kKeys; ++i) total = total + shared.sum[i][d];
    to[d] = total;
  }
}

// means, and codes and scales of the keys less their mean.
template <DType kType, int kDepth>
__global__ void __launch_bounds__(kKeyThreads)
    key_codes(AttentionArgs a, AttentionInt8Workspace s, bool aligned) {
  using Threads = KeyThreads<kDepth>;
  CodeShared<kDepth>& shared = ptx::shared_memory<CodeShared<kDepth>>();
  BlockPlace place;
  if (!place_block(a.cu_k, a.batch, a.sk, 1, kKeyBlock, blockIdx.x, place)) return;
  const int64_t kv_head = blockIdx.y, head = place.sequence * a.kv_heads + kv_head;
  for (int d = threadIdx.x; d < a.depth; d += kKeyThreads) {
    float total = 0.0f;
    for (int i = 0; i < kPieces; ++i) total = total + s.sums[(head * kPieces + i) * a.depth + d];
    const float mean = total / static_cast<float>(place.rows.count);
    shared.mean[d] = is_finite(mean) ? mean : 0.0f;
    if (place.block == 0) s.means[head * a.depth + d] = shared.mean[d];
  }
  ptx::sync_threads();
  const int column = threadIdx.x % Threads::kLanes * kVector;
  const int64_t all = a.cu_k ? a.sk : a.batch * a.sk;
  const int first = static_cast<int>(place.block) * kKeyBlock;
  for (int i = threadIdx.x / Threads::kLanes; i < kKeyBlock; i += Threads::kKeys) {
    const int key = first + i;
    const bool exists = key < place.rows.count;
    const int64_t row = place.rows.first + key;
    float v[kVector];
    load_eight<kType>(exists ? key_row(a, place.sequence, kv_head, row) : nullptr, column, a.depth,
                      aligned, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (column + e < a.depth) v[e] = v[e] - shared.mean[column + e];
    uint32_t codes[2];
    const float scale = row_codes<Threads::kLanes>(v, codes);
    if (!exists) continue;
    const int64_t at = kv_head * all + (a.cu_k ? row : place.sequence * a.sk + row);
    if (column < s.stored)
      ptx::store_global_64(s.codes + at * s.stored + column, codes[0], codes[1]);
    if (column == 0) s.scales[at] = scale;
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    attention_int8_rows(AttentionArgs a, AttentionWork w, const float* means) {
  if (!place_rows<T>(a, w)) return;
  const int64_t head = w.item.sequence * a.kv_heads + w.item.kv_head;
  const float* mean = a.softcap > 0.0f || a.sinks ? means + head * a.depth : nullptr;
  attention_block<T>(a, w, [&](typename T::Shared& shared, int group) {
    quantize_q<T>(shared, a, w, group, mean);
  });
}

template <DType kType, int kDepth>
void quantize_keys(const AttentionArgs& a, const AttentionInt8Workspace& s, Stream stream) {
  if (a.sk == 0) return;
  const int64_t blocks = blocks_for(a.cu_k != nullptr, a.batch, a.sk, kKeyBlock);
  NC_CHECK(blocks <= 0x7fffffff && a.batch <= 0x7fffffff / kPieces && a.sk < kMostRows,
           "attention_int8", "k must have less than 2^30 rows in at most 2^27 sequences, got ",
           a.sk, " in ", a.batch);
  const bool aligned = even_rows(a.k, a.k_strides, a.depth, 2);
  const auto run = [&](auto kernel, int64_t count, size_t bytes) {
    launch("attention_int8", kernel,
           dim3(static_cast<unsigned>(count), static_cast<unsigned>(a.kv_heads)), dim3(kKeyThreads),
           bytes, stream, a, s, aligned);
  };
  run(key_sums<kType, kDepth>, a.batch * kPieces, sizeof(SumShared<kDepth>));
  run(key_codes<kType, kDepth>, blocks, sizeof(CodeShared<kDepth>));
}

template <DType kType, int kDepth>
void launch_int8(AttentionArgs a, const AttentionInt8Workspace& s, Stream stream) {
  using T = Int8Tile<kType, kDepth>;
  const dim3 grid = grid_of_rows("attention_int8", a, T::kRows);
  quantize_keys<kType, kDepth>(a, s, stream);
  const int64_t keys = attention_int8_key_rows(a);
  a.k = s.codes, a.k_scale = s.scales;
  a.k_strides = {a.cu_k ? 0 : a.sk * s.stored, keys * s.stored, s.stored};
  a.k_scale_strides = {a.cu_k ? 0 : a.sk, keys, 1};
  AttentionWork w = {};
  w.aligned_q = even_rows(a.q, a.q_strides, a.depth, 2);
  w.aligned_k = true;
  w.aligned_v = even_rows(a.v, a.v_strides, a.v_depth, 2);
  w.aligned_out = even_rows(a.out, a.out_strides, a.v_depth, 2);
  launch("attention_int8", attention_int8_rows<T>, grid, dim3(T::kThreads),
         sizeof(typename T::Shared), stream, a, w, static_cast<const float*>(s.means));
}

template <DType kType>
void launch_int8_depth(const AttentionArgs& a, const AttentionInt8Workspace& s, Stream stream) {
  const int64_t depth = a.depth > a.v_depth ? a.depth : a.v_depth;
  if (depth <= 32) return launch_int8<kType, 32>(a, s, stream);
  if (depth <= 64) return launch_int8<kType, 64>(a, s, stream);
  if (depth <= 128) return launch_int8<kType, 128>(a, s, stream);
  launch_int8<kType, 256>(a, s, stream);
}

}  // namespace

AttentionInt8Workspace attention_int8_sm80_workspace(const AttentionArgs& a, void* memory) {
  const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t rows = a.kv_heads * attention_int8_key_rows(a);
  AttentionInt8Workspace s = {};
  s.stored = (a.depth + 15) / 16 * 16;  // for copies of 16 bytes
  const int64_t codes = padded(rows * s.stored), scales = padded(rows * 4),
                means = padded(a.batch * a.kv_heads * a.depth * 4);
  char* at = static_cast<char*>(memory);
  s.bytes = codes + scales + means * (1 + kPieces);
  if (!at) return s;
  s.codes = reinterpret_cast<int8_t*>(at);
  s.scales = reinterpret_cast<float*>(at += codes);
  s.means = reinterpret_cast<float*>(at += scales);
  s.sums = reinterpret_cast<float*>(at + means);
  return s;
}

void attention_int8_sm80(const AttentionArgs& a, void* workspace, Stream stream) {
  if (a.batch == 0 || a.heads == 0 || a.sq == 0) return;
  const AttentionInt8Workspace s = attention_int8_sm80_workspace(a, workspace);
  if (a.q_dtype == DType::kFloat16)
    launch_int8_depth<DType::kFloat16>(a, s, stream);
  else
    launch_int8_depth<DType::kBFloat16>(a, s, stream);
}

}  // namespace narrowcast
