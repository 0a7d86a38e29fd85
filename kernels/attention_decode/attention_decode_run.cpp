// Selection and the parallel loops: raw pointers in, no torch.
#include "attention_decode/attention_decode.h"

#include <algorithm>
#include <cmath>

#include "common/half.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "common/scratch.h"

namespace narrowcast {
namespace {

constexpr Variant<AttentionFn> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &attention_decode_rows_##name},
#include "attention_decode/attention_decode.inc"
#undef KERNEL
};
NC_VARIANT_LIST(attention_decode, AttentionFn, kVariants)

constexpr const char* kOp = "attention_decode";
constexpr int64_t kGrain = 1 << 18;  // products: some microseconds

int64_t chunks_of(int64_t length) { return (length + kDecodeChunk - 1) / kDecodeChunk; }

void store(void* p, int64_t i, DType dtype, float x) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(p)[i] = x;
  else
    static_cast<uint16_t*>(p)[i] = dtype == DType::kFloat16 ? to_float16(x) : to_bfloat16(x);
}

// The chunks of one row, in order: sums scaled to the largest maximum.
void merge(const AttentionArgs& a, const float* parts, int64_t chunks, int64_t step, float sink,
           int64_t out_at) {
  float top = sink, total = 0;
  for (int64_t c = 0; c < chunks; ++c) top = std::max(top, parts[c * step]);
  const float base = top == -INFINITY ? 0.0f : top;
  if (sink > -INFINITY) total = std::exp(sink - base);
  constexpr int64_t kPiece = 64;
  for (int64_t c = 0; c < chunks; ++c)
    total += parts[c * step + 1] * std::exp(parts[c * step] - base);
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < a.v_depth; d += kPiece) {
    const int64_t count = std::min(kPiece, a.v_depth - d);
    float sums[kPiece] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      if (parts[c * step + 1] == 0.0f) continue;  // saw nothing
      const float weight = std::exp(parts[c * step] - base);
      for (int64_t i = 0; i < count; ++i) sums[i] += weight * parts[c * step + 2 + d + i];
    }
    for (int64_t i = 0; i < count; ++i) store(a.out, out_at + d + i, a.out_dtype, sums[i] * factor);
  }
}

}  // namespace

void attention_decode_check(const AttentionDecodeArgs& args) {
  const AttentionArgs& a = args.attention;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.lengths[b];
    NC_CHECK(length >= a.sq && length <= args.capacity, kOp, "lengths must lie in ", a.sq, " .. ",
             args.capacity, " (the new queries, the capacity), got ", length, " for sequence ", b);
    if (!a.block_table) continue;
    for (int64_t p = 0; p * a.page_size < length; ++p) {
      const int64_t page = a.block_table[b * a.table_stride + p];
      NC_CHECK(page >= 0 && page < args.pages, kOp, "block_table must hold pages 0 .. ",
               args.pages - 1, ", got ", page, " for sequence ", b);
    }
  }
}

int64_t attention_decode_partials(const AttentionDecodeArgs& args) {
  const AttentionArgs& a = args.attention;
  const int64_t rows = a.kv_heads ? a.heads / a.kv_heads * a.sq : 0;
  if (rows > kDecodeRows) return 0;
  return a.batch * a.heads * a.sq * chunks_of(args.capacity) * (a.v_depth + 2);
}

void attention_decode_run(const AttentionDecodeArgs& args, float* partials) {
  const AttentionArgs& a = args.attention;
  if (a.batch == 0 || a.heads == 0 || a.sq == 0) return;
  const AttentionFn kernel = select_attention_decode();
  const int64_t rows = a.heads / a.kv_heads * a.sq;
  const int64_t blocks = (rows + kAttentionRows - 1) / kAttentionRows;
  const bool split = rows <= kDecodeRows;
  const auto items_of = [&](int64_t b) {
    return a.kv_heads * (split ? chunks_of(a.lengths[b]) : blocks);
  };
  int64_t items = 0, keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) items += items_of(b), keys += a.lengths[b];
  const int64_t width = rows <= 4 ? 2 * rows : std::max<int64_t>(rows, kDecodeRows);
  const int64_t products = a.kv_heads * keys * width * (a.depth + a.v_depth + 1);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, products / items));
  const int64_t step = rows * (a.v_depth + 2);  // of one chunk
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(attention_scratch_floats(a) * 4);
    int64_t b = 0, first = 0;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= first + items_of(b)) first += items_of(b++);
      const int64_t per_head = items_of(b) / a.kv_heads, piece = (i - first) % per_head;
      AttentionItem item = {b, (i - first) / per_head, 0, rows, 0, a.lengths[b], nullptr};
      if (split && per_head > 1) {
        item.key0 = piece * kDecodeChunk;
        item.key1 = std::min(item.key1, item.key0 + kDecodeChunk);
        item.partial = partials + i * step;
      } else if (!split) {
        item.row0 = piece * kAttentionRows;
        item.rows = std::min(kAttentionRows, rows - item.row0);
      }
      kernel(a, item, static_cast<float*>(scratch.data()));
    }
  });
  if (!split) return;
  const int64_t per_sequence = a.kv_heads * rows;
  parallel_for(0, a.batch * per_sequence, 64, [&](int64_t begin, int64_t end) {
    int64_t b = 0, first = 0;
    for (int64_t i = begin; i < end; ++i) {
      while (b < i / per_sequence) first += items_of(b++);
      const int64_t chunks = chunks_of(a.lengths[b]);
      if (chunks <= 1) continue;
      const int64_t kv_head = i % per_sequence / rows, r = i % rows;
      const int64_t group = a.heads / a.kv_heads, h = kv_head * group + r % group;
      merge(a, partials + (first + kv_head * chunks) * step + r * (a.v_depth + 2), chunks, step,
            a.sinks ? a.sinks[h] : -INFINITY,
            b * a.out_strides.batch + h * a.out_strides.head + r / group * a.out_strides.row);
    }
  });
}

}  // namespace narrowcast
