// attention_sm80.cu and attention_decode_sm80.cu, which share their loop, against float64.
#include <algorithm>

#include "attention/attention_cuda.h"
#include "attention_decode/attention_decode_cuda.h"
#include "attention_truth.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

constexpr auto kHalf = DType::kFloat16, kBrain = DType::kBFloat16;

// Every depth, masks, bias, sinks, packed sequences, odd shapes.
namespace rows {

struct Size {
  int64_t batch, heads, kv_heads, sq, sk, depth, v_depth = 0;  // v_depth 0: depth
};

struct Case {
  Size size;
  DType dtype = kHalf;
  bool causal = false;
  int64_t window = 0;
  float softcap = 0.0f;
  bool bias = false, sinks = false, lse = false;
  size_t offset = 0;  // of q, k and v from an aligned address
  int64_t pad = 0;    // between rows
  std::vector<int32_t> cu_q = {}, cu_k = {};
};

// Where a sequence begins, as the kernel takes it.
int64_t start(int32_t cu, int64_t total) { return std::clamp<int64_t>(cu, 0, total); }

void run(const Case& c) {
  const Size& z = c.size;
  const int64_t dv = z.v_depth ? z.v_depth : z.depth, ld = z.depth + c.pad, ldv = dv + c.pad;
  const bool packed = !c.cu_q.empty();
  const int64_t outer = packed ? 1 : z.batch;
  const Buffer<uint16_t> q(truth::halves(c.dtype, outer * z.heads * z.sq * ld), c.offset);
  const Buffer<uint16_t> k(truth::halves(c.dtype, outer * z.kv_heads * z.sk * ld), c.offset);
  const Buffer<uint16_t> v(truth::halves(c.dtype, outer * z.kv_heads * z.sk * ldv), c.offset);
  const Buffer<uint16_t> bias(truth::halves(kHalf, outer * z.heads * z.sq * z.sk));
  std::vector<float> logits(z.heads, 0.5f);
  logits[0] = -INFINITY;
  const Buffer<float> sinks(logits), lse(outer * z.heads * z.sq);
  const Buffer<uint16_t> out(outer * z.heads * z.sq * dv);
  const Buffer<int32_t> cu_q(c.cu_q), cu_k(c.cu_k);

  AttentionArgs a = {};
  a.q = q.data, a.k = k.data, a.v = v.data, a.out = out.data;
  a.batch = z.batch, a.heads = z.heads, a.kv_heads = z.kv_heads;
  a.sq = z.sq, a.sk = z.sk, a.depth = z.depth, a.v_depth = dv;
  if (packed) {  // [T, H, D]
    a.cu_q = cu_q.data, a.cu_k = cu_k.data;
    a.q_strides = {0, ld, z.heads * ld}, a.k_strides = {0, ld, z.kv_heads * ld};
    a.v_strides = {0, ldv, z.kv_heads * ldv}, a.out_strides = {0, dv, z.heads * dv};
    a.lse_strides = {0, 1, z.heads};
  } else {
    a.q_strides = {z.heads * z.sq * ld, z.sq * ld, ld};
    a.k_strides = {z.kv_heads * z.sk * ld, z.sk * ld, ld};
    a.v_strides = {z.kv_heads * z.sk * ldv, z.sk * ldv, ldv};
    a.out_strides = {z.heads * z.sq * dv, z.sq * dv, dv};
    a.lse_strides = {z.heads * z.sq, z.sq, 1};
  }
  if (c.bias) {
    a.bias = bias.data, a.bias_dtype = kHalf;
    a.bias_strides[0] = z.heads * z.sq * z.sk;
    a.bias_strides[1] = z.sq * z.sk, a.bias_strides[2] = z.sk, a.bias_strides[3] = 1;
  }
  if (c.sinks) a.sinks = sinks.data;
  if (c.lse) a.lse = lse.data;
  a.q_dtype = a.kv_dtype = a.out_dtype = c.dtype;
  a.scale = z.depth ? 1.0f / std::sqrt(static_cast<float>(z.depth)) : 1.0f;
  a.softcap = c.softcap, a.window = c.window, a.causal = c.causal;
  attention_sm80(a, nullptr);

  for (int64_t b = 0; b < z.batch; ++b) {
    const int64_t q0 = packed ? start(c.cu_q[b], z.sq) : 0,
                  k0 = packed ? start(c.cu_k[b], z.sk) : 0;
    const int64_t sq = packed ? start(c.cu_q[b + 1], z.sq) - q0 : z.sq;
    const int64_t k1 = packed ? start(c.cu_k[b + 1], z.sk) : z.sk;
    const int64_t sk = std::max<int64_t>(0, k1 - k0);
    for (int64_t h = 0; h < z.heads; ++h)
      for (int64_t i = 0; i < sq; ++i) {
        double want;
        const std::vector<double> row = truth::row(a, b, h, i, q0, k0, sq, sk, &want);
        truth::compare(
            a, b * a.out_strides.batch + h * a.out_strides.head + (q0 + i) * a.out_strides.row,
            row);
        if (!c.lse) continue;
        const float* got =
            &lse[b * a.lse_strides.batch + h * a.lse_strides.head + (q0 + i) * a.lse_strides.row];
        require(emulator::is_written(got), "an lse was not written");
        require(*got == want || std::abs(*got - want) < 2e-5 * (std::abs(want) + 1), "wrong lse");
      }
  }
}

void run_all() {
  const std::vector<Case> cases = {
      {.size = {1, 1, 1, 1, 1, 1}},
      {.size = {1, 2, 1, 70, 67, 32}, .causal = true, .lse = true},
      {.size = {2, 1, 1, 5, 130, 64}, .dtype = kBrain, .causal = true, .window = 20},
      {.size = {1, 3, 3, 66, 40, 24, 40}, .window = 9, .bias = true, .lse = true},
      {.size = {1, 4, 2, 33, 65, 64}, .causal = true, .softcap = 3.0f, .sinks = true, .lse = true},
      {.size = {1, 2, 2, 9, 5, 128}, .dtype = kBrain, .causal = true, .lse = true},
      {.size = {1, 2, 1, 34, 129, 120}, .softcap = 2.0f, .bias = true, .pad = 8},
      {.size = {1, 1, 1, 3, 70, 256, 130}},
      {.size = {1, 2, 1, 20, 77, 37}, .causal = true, .offset = 1, .pad = 3},
      {.size = {2, 1, 1, 4, 0, 16}, .lse = true},
      {.size = {1, 1, 1, 64, 65, 32}, .causal = true},
      {.size = {2, 2, 1, 5, 20, 16}, .bias = true},
      {.size = {3, 1, 1, 40, 60, 32}, .cu_q = {-2, 10, 30, 99}, .cu_k = {50, 20, 30, 99}},
      {.size = {3, 4, 2, 70, 80, 64},
       .causal = true,
       .lse = true,
       .cu_q = {0, 1, 1, 70},
       .cu_k = {0, 7, 9, 80}},
      {.size = {2, 1, 1, 130, 66, 40}, .dtype = kBrain, .cu_q = {0, 64, 130}, .cu_k = {0, 65, 66}},
  };
  for (const Case& c : cases) expect("attention", "", 2, [&] { run(c); });
}

}  // namespace rows

// Caches of 16 bits and int8, pages, chunks, few rows and many.
namespace decode {

struct Case {
  int64_t heads, kv_heads, sq, capacity, depth;
  std::vector<int32_t> lengths;
  DType dtype = kHalf;
  bool int8 = false, sinks = false;
  int64_t window = 0, page = 0;  // page: keys of one, 0: none
  float softcap = 0.0f;
  int64_t pad = 0;      // between rows
  bool strays = false;  // pages that do not exist, which count as page 0
};

void run(const Case& c) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size()), ld = c.depth + c.pad;
  const int64_t pages = c.page ? c.capacity / c.page : 1, page = c.page ? c.page : c.capacity;
  const int64_t keys = batch * pages * c.kv_heads * page;  // of all pages, one more of them unused
  const Buffer<uint16_t> q(truth::halves(c.dtype, batch * c.heads * c.sq * c.depth));
  const Buffer<uint16_t> k(truth::halves(c.dtype, keys * ld)), v(truth::halves(c.dtype, keys * ld));
  std::vector<int8_t> codes(keys * ld);
  for (int8_t& x : codes) x = static_cast<int8_t>(emulator::random_number());
  std::vector<float> scales(keys);
  for (float& s : scales) s = 0.001f * static_cast<float>(1 + emulator::random_number() % 16);
  const Buffer<int8_t> k8(codes), v8(codes, 16);
  const Buffer<float> k_scale(scales), v_scale(scales);
  std::vector<int32_t> table(batch * pages);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(table.size() - 1 - i);
  std::vector<int32_t> given = table;
  if (c.strays)
    table[0] = table[1] = 0, given[0] = -1, given[1] = static_cast<int32_t>(table.size());
  const Buffer<int32_t> block_table(given), lengths(c.lengths);
  const Buffer<float> sinks(std::vector<float>(c.heads, 1.5f));
  const Buffer<uint16_t> out(batch * c.heads * c.sq * c.depth);

  AttentionDecodeArgs args = {};
  AttentionArgs& a = args.attention;
  a.q = q.data, a.out = out.data, a.lengths = lengths.data;
  a.k = c.int8 ? static_cast<const void*>(k8.data) : k.data;
  a.v = c.int8 ? static_cast<const void*>(v8.data) : v.data;
  a.batch = batch, a.heads = c.heads, a.kv_heads = c.kv_heads, a.sq = c.sq;
  a.depth = a.v_depth = c.depth;
  a.q_strides = a.out_strides = {c.heads * c.sq * c.depth, c.sq * c.depth, c.depth};
  a.k_strides = a.v_strides = {c.kv_heads * page * ld, page * ld, ld};
  if (c.int8) {
    a.k_scale = k_scale.data, a.v_scale = v_scale.data;
    a.k_scale_strides = a.v_scale_strides = {c.kv_heads * page, page, 1};
  }
  if (c.page) {
    a.block_table = block_table.data, a.page_size = page, a.table_stride = pages;
    args.pages = batch * pages;
  }
  args.capacity = c.capacity;
  if (c.sinks) a.sinks = sinks.data;
  a.q_dtype = a.out_dtype = c.dtype, a.kv_dtype = c.int8 ? DType::kInt8 : c.dtype;
  a.scale = 1.0f / std::sqrt(static_cast<float>(c.depth));
  a.softcap = c.softcap, a.window = c.window, a.causal = true;
  const int64_t count = attention_decode_sm80_partials(args);
  const Buffer<float> partials(count);
  attention_decode_sm80(args, partials.data, nullptr);
  if (c.page) a.block_table = table.data();

  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.sq; ++i) {
        double lse;
        const int64_t length = c.lengths[b] < 0            ? 0
                               : c.lengths[b] > c.capacity ? c.capacity
                                                           : c.lengths[b];
        const std::vector<double> want = truth::row(a, b, h, i, 0, 0, c.sq, length, &lse);
        truth::compare(a, b * a.out_strides.batch + h * a.out_strides.head + i * a.out_strides.row,
                       want);
      }
}

void run_all() {
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1, {1}},
      {4, 2, 1, 700, 64, {600, 3, 512, 513}, kHalf, false, true},
      {4, 1, 3, 80, 40, {80, 5, 64}, kBrain, true},
      {3, 1, 1, 1100, 32, {1090}, kHalf, true, true, 600},
      {2, 2, 2, 96, 128, {96, 50}, kBrain, false, false, 30, 16},
      {2, 1, 1, 560, 48, {560, 530}, kHalf, true, false, 0, 8, 2.0f},
      {1, 1, 1, 48, 32, {40}, kHalf, false, false, 0, 8, 0.0f, 0, true},
      {2, 1, 1, 90, 37, {77}, kHalf, true, false, 0, 0, 0.0f, 3},
      {2, 1, 1, 70, 35, {66}, kHalf, false, false, 0, 0, 0.0f, 2},
      {2, 1, 1, 70, 256, {70}, kHalf, true},
      {4, 2, 20, 100, 64, {90, 33}, kHalf, false, true, 0, 4},
      {2, 1, 33, 70, 160, {70}, kHalf, true},
      {2, 1, 17, 70, 128, {41, 17}, kBrain, true, false, 0, 35},
      {1, 1, 2, 40, 16, {1, 0, -3, 99}},
  };
  for (const Case& c : cases) expect("attention_decode", "", 2, [&] { run(c); });
}

}  // namespace decode

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
  rows::run_all();
  decode::run_all();
  return check::result("attention_sm80, attention_decode_sm80");
}
