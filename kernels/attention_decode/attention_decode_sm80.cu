// attention_decode on sm_80 and later: few new queries over a long cache of 16 bits or int8.
//
//   out = softmax(cap(scale * q k^T)) v over the keys of a cache, pages included: see
//   attention_decode.h; the loop is attention/attention_tile.cuh.
//
// Work: up to 16 rows of a K/V head share a block, whose four warps share the keys. A sequence is
// cut into chunks of kChunk keys, a block each, whose partial results a second kernel merges in
// order; where one chunk holds the sequence, its block finishes. The cut depends on the sequence's
// own length only: its result has the same bits whatever the batch. More rows: 64 of them to a
// block, which passes over all the keys.
// Numerics: those of attention_sm80.cu. int8: scores from exact products with the codes of k; v is
// rounded to 16 bits once it is widened.
// Cost: one read of the cache, which bounds it; 2 (D + Dv) operations a row and key.
//
// GATE decode_rows: spills = 0, contains HMMA.16816.F32 LDSM.16.M88.4 LDSM.16.MT88.4
// GATE decode_rows: contains LDGSTS.E.BYPASS.128, registers <= 255
// GATE decode_merge: spills = 0, registers <= 64
// GATE block: shared <= 99000
#include "attention/attention_tile.cuh"
#include "attention_decode/attention_decode_cuda.h"

namespace narrowcast {
namespace {

constexpr int kChunk = 512;
constexpr int kMergeWarps = 4;

// A block's piece: a chunk of the keys (kWarpsK > 1), or a block of rows.
template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    decode_rows(AttentionDecodeArgs args, AttentionWork w, float* partials, int64_t chunks) {
  const AttentionArgs& a = args.attention;
  const int64_t rows = a.heads / a.kv_heads * a.sq, piece = blockIdx.x;
  w.item.kv_head = blockIdx.y, w.item.sequence = blockIdx.z;
  w.sq = static_cast<int>(a.sq), w.sk = inside(a.lengths[w.item.sequence], args.capacity);
  w.item.rows = rows, w.item.key1 = w.sk;
  if constexpr (T::kWarpsK > 1) {
    w.item.key0 = piece * kChunk;
    if (piece > 0 && w.item.key0 >= w.sk) return;
    if (w.sk > kChunk) {
      const int64_t head = w.item.sequence * a.kv_heads + w.item.kv_head;
      w.item.partial = partials + (head * chunks + piece) * rows * (a.v_depth + 2);
      if (w.item.key0 + kChunk < w.sk) w.item.key1 = w.item.key0 + kChunk;
    }
  } else {
    w.item.row0 = piece * T::kRows;
    w.item.rows = rows - w.item.row0 < T::kRows ? rows - w.item.row0 : T::kRows;
  }
  attention_block<T>(
      a, w, [&](typename T::Shared& shared, int group) { copy_q<T>(shared, a, w, group); });
}

// The chunks of a row, in order: sums brought to the largest maximum. A warp a row.
template <DType kType>
__global__ void __launch_bounds__(kMergeWarps* ptx::kWarp, 8)
    decode_merge(AttentionDecodeArgs args, const float* partials, int64_t chunks) {
  const AttentionArgs& a = args.attention;
  const int group = static_cast<int>(a.heads / a.kv_heads), rows = group * static_cast<int>(a.sq);
  const int at = blockIdx.x * kMergeWarps + threadIdx.x / ptx::kWarp;
  const int head = at / rows, r = at % rows, kv_heads = static_cast<int>(a.kv_heads);
  const int64_t b = head / kv_heads;
  if (b >= a.batch) return;
  const int length = inside(a.lengths[b], args.capacity), count = (length + kChunk - 1) / kChunk;
  if (count <= 1) return;  // it was finished at once
  const int64_t step = rows * (a.v_depth + 2);
  const float* parts = partials + int64_t{head} * chunks * step + r * (a.v_depth + 2);
  const int64_t h = head % kv_heads * group + r % group;

  float top = a.sinks ? a.sinks[h] * kLog2E : -INFINITY;
  for (int c = 0; c < count; ++c) {
    const float other = parts[c * step];
    top = other > top ? other : top;
  }
  const float base = top == -INFINITY ? 0.0f : top;
  float total = a.sinks ? exp2f(a.sinks[h] * kLog2E - base) : 0.0f;
  for (int c = 0; c < count; ++c) {
    const float share = parts[c * step + 1];
    if (share != 0.0f) total = total + share * exp2f(parts[c * step] - base);
  }
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  uint16_t* out = static_cast<uint16_t*>(a.out) + b * a.out_strides.batch + h * a.out_strides.head +
                  r / group * a.out_strides.row;
  for (int64_t d = threadIdx.x % ptx::kWarp; d < a.v_depth; d += ptx::kWarp) {
    float sum = 0.0f;
    for (int c = 0; c < count; ++c) {
      const float* part = parts + c * step;
      if (part[1] != 0.0f) sum = sum + part[d + 2] * exp2f(part[0] - base);
    }
    out[d] = half_bits<kType>(sum * factor);
  }
}

// Few rows, which share the keys among warps; more of them would fill the tensor cores.
constexpr int kFewRows = 16;

int64_t rows_of(const AttentionArgs& a) { return a.heads / a.kv_heads * a.sq; }
int64_t chunks_of(const AttentionDecodeArgs& args) {
  const int64_t chunks = (args.capacity + kChunk - 1) / kChunk;
  return chunks ? chunks : 1;
}

template <DType kType, int kDepth, bool kInt8>
void launch_decode_rows(const AttentionDecodeArgs& args, float* partials, Stream stream) {
  const AttentionArgs& a = args.attention;
  constexpr int64_t kBytes = kInt8 ? 1 : 2;
  constexpr Codes kCodes = kInt8 ? Codes::kCache : Codes::kNone;
  AttentionWork w = {};
  w.pages = args.pages;
  w.aligned_q = even_rows(a.q, a.q_strides, a.depth, 2);
  w.aligned_k = even_rows(a.k, a.k_strides, a.depth, kBytes);
  w.aligned_v = even_rows(a.v, a.v_strides, a.v_depth, kBytes);
  w.aligned_out = even_rows(a.out, a.out_strides, a.v_depth, 2);
  NC_CHECK(a.kv_heads <= 65535 && a.batch <= 65535 && a.batch * a.kv_heads * rows_of(a) < kMostRows,
           "attention_decode",
           "k_cache and q must have at most 65535 heads and sequences and 2^30 rows, got ",
           a.kv_heads, ", ", a.batch, " and ", a.batch * a.kv_heads * rows_of(a));
  const auto run = [&](auto kernel, int threads, size_t bytes, int64_t pieces) {
    launch("attention_decode", kernel,
           dim3(static_cast<unsigned>(pieces), static_cast<unsigned>(a.kv_heads),
                static_cast<unsigned>(a.batch)),
           dim3(static_cast<unsigned>(threads)), bytes, stream, args, w, partials, chunks_of(args));
  };
  if (rows_of(a) > kFewRows) {
    using T = AttentionTile<kType, kDepth, 4, 1, kCodes>;
    run(decode_rows<T>, T::kThreads, sizeof(typename T::Shared),
        (rows_of(a) + T::kRows - 1) / T::kRows);
    return;
  }
  using T = AttentionTile<kType, kDepth, 1, 4, kCodes>;
  run(decode_rows<T>, T::kThreads, sizeof(typename T::Shared), chunks_of(args));
  if (chunks_of(args) == 1) return;
  const int64_t rows = a.batch * a.kv_heads * rows_of(a);
  launch("attention_decode", decode_merge<kType>,
         dim3(static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps)),
         dim3(kMergeWarps * ptx::kWarp), 0, stream, args, partials, chunks_of(args));
}

template <DType kType, bool kInt8>
void launch_decode(const AttentionDecodeArgs& args, float* partials, Stream stream) {
  if (args.attention.depth <= 64)
    return launch_decode_rows<kType, 64, kInt8>(args, partials, stream);
  if (args.attention.depth <= 128)
    return launch_decode_rows<kType, 128, kInt8>(args, partials, stream);
  launch_decode_rows<kType, 256, kInt8>(args, partials, stream);
}

}  // namespace

int64_t attention_decode_sm80_partials(const AttentionDecodeArgs& args) {
  const AttentionArgs& a = args.attention;
  if (a.batch == 0 || a.heads == 0 || a.sq == 0 || rows_of(a) > kFewRows) return 0;
  if (chunks_of(args) == 1) return 0;
  return a.batch * a.heads * a.sq * chunks_of(args) * (a.v_depth + 2);
}

void attention_decode_sm80(const AttentionDecodeArgs& args, float* partials, Stream stream) {
  const AttentionArgs& a = args.attention;
  if (a.batch == 0 || a.heads == 0 || a.sq == 0) return;
  const bool codes = a.kv_dtype == DType::kInt8;
  if (a.q_dtype == DType::kFloat16)
    codes ? launch_decode<DType::kFloat16, true>(args, partials, stream)
          : launch_decode<DType::kFloat16, false>(args, partials, stream);
  else
    codes ? launch_decode<DType::kBFloat16, true>(args, partials, stream)
          : launch_decode<DType::kBFloat16, false>(args, partials, stream);
}

}  // namespace narrowcast
