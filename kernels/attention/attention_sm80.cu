// attention on sm_80 and later: float16 and bfloat16 tensor cores (mma m16n8k16), one pass over the
// keys with a running maximum.
//
//   out = softmax(cap(scale * q k^T) + bias) v, row by row: see attention.h; the loop is
//   attention_tile.cuh.
//
// Work: a block has 64 rows of one K/V head; heads that share keys sit in one block. Keys that no
// row of the block sees are passed over. Blocks with many keys come first.
// Numerics: products exact, sums, softmax and denominators in float32; the weights are rounded to
// the 16 bits of v for the second product.
// Cost: 2 Sq Sk (D + Dv) operations a head, half of it where causal; k and v are read once per 64
// rows.
//
// GATE attention_rows: spills = 0, contains HMMA.16816.F32 LDSM.16.M88.4 LDSM.16.MT88.4 MUFU.EX2
// GATE attention_rows: contains LDGSTS.E.BYPASS.128
// GATE attention_rows.*Li(32|64)E: registers <= 168
// GATE attention_rows.*Li(128|256)E: registers <= 255
// GATE block: shared <= 99000
#include "attention/attention_cuda.h"
#include "attention/attention_tile.cuh"

namespace narrowcast {
namespace {

template <DType kType, int kDepth>
using Tile = AttentionTile<kType, kDepth, 4, 1, false>;

__device__ __forceinline__ int span(int64_t begin, int end) {
  return end > begin ? end - static_cast<int>(begin) : 0;
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    attention_rows(AttentionArgs a, AttentionWork w) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t block = blockIdx.x, b = 0, blocks;
  w.item.kv_head = blockIdx.y;
  if (a.cu_q) {
    for (;; ++b, block -= blocks) {
      if (b == a.batch) return;  // lengths are only known here: the grid has blocks to spare
      w.q0 = inside(a.cu_q[b], a.sq), w.sq = span(w.q0, inside(a.cu_q[b + 1], a.sq));
      blocks = (w.sq * group + T::kRows - 1) / T::kRows;
      if (block < blocks) break;
    }
    w.k0 = inside(a.cu_k[b], a.sk), w.sk = span(w.k0, inside(a.cu_k[b + 1], a.sk));
  } else {
    blocks = (a.sq * group + T::kRows - 1) / T::kRows;
    b = block / blocks, block = block % blocks;
    w.sq = static_cast<int>(a.sq), w.sk = static_cast<int>(a.sk);
  }
  w.item.sequence = b;
  w.item.row0 = (blocks - 1 - block) * T::kRows;  // causal: the last rows see most
  const int64_t left = w.sq * group - w.item.row0;
  w.item.rows = left < T::kRows ? left : T::kRows;
  w.item.key1 = w.sk;
  attention_block<T>(a, w);
}

template <DType kType, int kDepth>
void launch_rows(const AttentionArgs& a, Stream stream) {
  using T = Tile<kType, kDepth>;
  const int64_t rows = a.sq * (a.heads / a.kv_heads);
  // Each sequence has at most one block that is not full.
  const int64_t blocks =
      a.cu_q ? rows / T::kRows + a.batch : (rows + T::kRows - 1) / T::kRows * a.batch;
  NC_CHECK(blocks <= 0x7fffffff && rows < kMostRows && a.kv_heads <= 65535, "attention",
           "q must give at most 2^31 blocks of rows and k at most 65535 heads, got ", blocks,
           " and ", a.kv_heads);
  AttentionWork w = {};
  w.aligned_q = even_rows(a.q, a.q_strides, a.depth, 2);
  w.aligned_k = even_rows(a.k, a.k_strides, a.depth, 2);
  w.aligned_v = even_rows(a.v, a.v_strides, a.v_depth, 2);
  w.aligned_out = even_rows(a.out, a.out_strides, a.v_depth, 2);
  launch("attention", attention_rows<T>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(a.kv_heads)), dim3(T::kThreads),
         sizeof(typename T::Shared), stream, a, w);
}

template <DType kType>
void launch_depth(const AttentionArgs& a, Stream stream) {
  const int64_t depth = a.depth > a.v_depth ? a.depth : a.v_depth;
  if (depth <= 32) return launch_rows<kType, 32>(a, stream);
  if (depth <= 64) return launch_rows<kType, 64>(a, stream);
  if (depth <= 128) return launch_rows<kType, 128>(a, stream);
  launch_rows<kType, 256>(a, stream);
}

}  // namespace

void attention_sm80(const AttentionArgs& a, Stream stream) {
  if (a.batch == 0 || a.heads == 0 || a.sq == 0) return;
  if (a.q_dtype == DType::kFloat16)
    launch_depth<DType::kFloat16>(a, stream);
  else
    launch_depth<DType::kBFloat16>(a, stream);
}

}  // namespace narrowcast
