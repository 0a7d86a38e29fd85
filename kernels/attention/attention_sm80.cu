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
using Tile = AttentionTile<kType, kDepth, 4, 1, Codes::kNone>;

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    attention_rows(AttentionArgs a, AttentionWork w) {
  if (!place_rows<T>(a, w)) return;
  attention_block<T>(
      a, w, [&](typename T::Shared& shared, int group) { copy_q<T>(shared, a, w, group); });
}

template <DType kType, int kDepth>
void launch_rows(const AttentionArgs& a, Stream stream) {
  using T = Tile<kType, kDepth>;
  AttentionWork w = {};
  w.aligned_q = even_rows(a.q, a.q_strides, a.depth, 2);
  w.aligned_k = even_rows(a.k, a.k_strides, a.depth, 2);
  w.aligned_v = even_rows(a.v, a.v_strides, a.v_depth, 2);
  w.aligned_out = even_rows(a.out, a.out_strides, a.v_depth, 2);
  launch("attention", attention_rows<T>, grid_of_rows("attention", a, T::kRows), dim3(T::kThreads),
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
