// attention_sm80.cu, attention_int8_sm80.cu and attention_decode_sm80.cu, which share their loop,
// against float64.
#include <algorithm>
#include <cstring>

#include "attention/attention_cuda.h"
#include "attention_decode/attention_decode_cuda.h"
#include "attention_int8/attention_int8_cuda.h"
#include "attention_int8/attention_int8_tile.h"
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
  float shift = 0.0f;                              // of all values of q and k
  int64_t infinite_query = -1, infinite_key = -1;  // rows of q and k that are not finite
};

// Where a sequence begins, as the kernel takes it.
int64_t start(int32_t cu, int64_t total) { return std::clamp<int64_t>(cu, 0, total); }

// The tensors of a case, and the arguments that name them.
struct Call {
  const Size z;
  const bool packed;
  const int64_t dv, ld, ldv, outer;
  const Buffer<uint16_t> q, k, v, bias;
  const Buffer<float> sinks, lse;
  const Buffer<uint16_t> out;
  const Buffer<int32_t> cu_q, cu_k;
  AttentionArgs args = {};

  explicit Call(const Case& c)
      : z(c.size),
        packed(!c.cu_q.empty()),
        dv(z.v_depth ? z.v_depth : z.depth),
        ld(z.depth + c.pad),
        ldv(dv + c.pad),
        outer(packed ? 1 : z.batch),
        q(values(c, outer * z.heads * z.sq, ld, c.infinite_query), c.offset),
        k(values(c, outer * z.kv_heads * z.sk, ld, c.infinite_key), c.offset),
        v(truth::halves(c.dtype, outer * z.kv_heads * z.sk * ldv), c.offset),
        bias(truth::halves(kHalf, outer * z.heads * z.sq * z.sk)),
        sinks(logits(z.heads)),
        lse(outer * z.heads * z.sq),
        out(outer * z.heads * z.sq * dv),
        cu_q(c.cu_q),
        cu_k(c.cu_k) {
    AttentionArgs& a = args;
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
  }

  static std::vector<uint16_t> values(const Case& c, int64_t rows, int64_t ld, int64_t infinite) {
    std::vector<uint16_t> v = truth::halves(c.dtype, rows * ld);
    for (int64_t i = 0; i < rows * ld; ++i)  // something for the mean of the keys to find
      store_float(v.data(), i, c.dtype, load_float(v.data(), i, c.dtype) + c.shift);
    if (infinite >= 0) store_float(v.data(), infinite * ld + c.size.depth - 1, c.dtype, INFINITY);
    return v;
  }
  static std::vector<float> logits(int64_t heads) {
    std::vector<float> v(heads, 0.5f);
    v[0] = -INFINITY;
    return v;
  }

  // visit(b, q0, k0, sq, sk) for every sequence.
  template <class Visit>
  void for_sequences(const Case& c, Visit visit) const {
    for (int64_t b = 0; b < z.batch; ++b) {
      const int64_t q0 = packed ? start(c.cu_q[b], z.sq) : 0,
                    k0 = packed ? start(c.cu_k[b], z.sk) : 0;
      const int64_t q1 = packed ? start(c.cu_q[b + 1], z.sq) : z.sq;
      const int64_t k1 = packed ? start(c.cu_k[b + 1], z.sk) : z.sk;
      visit(b, q0, k0, q1 - q0, std::max<int64_t>(0, k1 - k0));
    }
  }
};

void run(const Case& c) {
  const Call call(c);
  const AttentionArgs& a = call.args;
  attention_sm80(a, nullptr);
  call.for_sequences(c, [&](int64_t b, int64_t q0, int64_t k0, int64_t sq, int64_t sk) {
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < sq; ++i) {
        double want;
        const std::vector<double> row = truth::row(a, b, h, i, q0, k0, sq, sk, &want);
        truth::compare(
            a, b * a.out_strides.batch + h * a.out_strides.head + (q0 + i) * a.out_strides.row,
            row);
        if (!c.lse) continue;
        const float* got = &call.lse[b * a.lse_strides.batch + h * a.lse_strides.head +
                                     (q0 + i) * a.lse_strides.row];
        require(emulator::is_written(got), "an lse was not written");
        require(*got == want || std::abs(*got - want) < 2e-5 * (std::abs(want) + 1), "wrong lse");
      }
  });
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

// The integers are those of the CPU's quantisation around the kernel's own mean, bit for bit; what
// follows from them is compared with float64.
namespace int8 {

using rows::Call;
using rows::Case;

void expect_mean(const AttentionArgs& a, const float* mean, int64_t at, int64_t count) {
  for (int64_t d = 0; d < a.depth; ++d) {
    double sum = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const double v = load_float(a.k, at + j * a.k_strides.row + d, a.kv_dtype);
      sum += std::isfinite(v) ? v : 0.0;
    }
    require(emulator::is_written(mean + d), "a mean was not written");
    require(std::abs(mean[d] - sum / count) < 2e-6 * (1 + std::abs(sum / count)), "wrong mean");
  }
}

void run(const Case& c) {
  const Call call(c);
  const AttentionArgs& a = call.args;
  const Buffer<uint8_t> memory(attention_int8_sm80_workspace(a, nullptr).bytes);
  const AttentionInt8Workspace w = attention_int8_sm80_workspace(a, memory.data);
  attention_int8_sm80(a, memory.data, nullptr);

  // q and k behind the quantisation, in float32; what k lacks is one more column, with a key of 1.
  const int64_t wide = a.depth + 1;
  const int64_t all = attention_int8_key_rows(a);
  std::vector<float> q(call.outer * a.heads * a.sq * wide), k(a.kv_heads * all * wide, 1.0f);
  std::vector<float> v(call.v.count), line(a.depth);
  for (size_t i = 0; i < v.size(); ++i) v[i] = load_float(a.v, i, a.kv_dtype);
  std::vector<int8_t> codes(a.depth);
  AttentionArgs t = a;
  t.q = q.data(), t.k = k.data(), t.v = v.data(), t.depth = wide, t.scale = 1.0f;
  t.q_dtype = t.kv_dtype = DType::kFloat32;
  t.q_strides = call.packed ? AttentionStrides{0, a.sq * wide, wide}
                            : AttentionStrides{a.heads * a.sq * wide, a.sq * wide, wide};
  t.k_strides = {call.packed ? 0 : a.sk * wide, all * wide, wide};
  call.for_sequences(c, [&](int64_t b, int64_t q0, int64_t k0, int64_t sq, int64_t sk) {
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      const float* mean = w.means + (b * a.kv_heads + h) * a.depth;
      const int64_t from = b * a.k_strides.batch + h * a.k_strides.head + k0 * a.k_strides.row;
      if (sk > 0) expect_mean(a, mean, from, sk);
      for (int64_t j = 0; j < sk; ++j) {
        for (int64_t d = 0; d < a.depth; ++d)
          line[d] = load_float(a.k, from + j * a.k_strides.row + d, a.kv_dtype) - mean[d];
        const float scale = quantize_line(line.data(), a.depth, codes.data());
        const int64_t at = h * all + (call.packed ? 0 : b * a.sk) + k0 + j;
        require(emulator::is_written(w.scales + at), "a scale of a key was not written");
        require(std::memcmp(w.scales + at, &scale, 4) == 0 ||
                    (std::isnan(scale) && std::isnan(w.scales[at])),
                "wrong scale of a key");
        for (int64_t d = 0; d < w.stored; ++d) {
          const int8_t* got = w.codes + at * w.stored + d;
          require(emulator::is_written(got), "a code was not written");
          require(*got == (d < a.depth ? codes[d] : 0), "wrong code of a key");
        }
        for (int64_t d = 0; d < a.depth; ++d) k[at * wide + d] = codes[d] * scale;
      }
    }
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < sq; ++i) {
        const int64_t from =
            b * a.q_strides.batch + h * a.q_strides.head + (q0 + i) * a.q_strides.row;
        float* to = &q[b * t.q_strides.batch + h * t.q_strides.head + (q0 + i) * wide];
        double back = 0.0;
        for (int64_t d = 0; d < a.depth; ++d) {
          line[d] = load_float(a.q, from + d, a.q_dtype) * a.scale;
          if (sk > 0)
            back += line[d] * w.means[(b * a.kv_heads + h / (a.heads / a.kv_heads)) * a.depth + d];
        }
        const float scale = quantize_line(line.data(), a.depth, codes.data());
        for (int64_t d = 0; d < a.depth; ++d) to[d] = codes[d] * scale;
        to[a.depth] = a.softcap > 0.0f || a.sinks ? static_cast<float>(back) : 0.0f;
        double lse;
        const std::vector<double> row = truth::row(t, b, h, i, q0, k0, sq, sk, &lse);
        const int64_t at =
            b * a.out_strides.batch + h * a.out_strides.head + (q0 + i) * a.out_strides.row;
        if (!std::isnan(lse)) {
          truth::compare(a, at, row);
          continue;
        }
        for (int64_t d = 0; d < a.v_depth; ++d)
          require(std::isnan(load_float(a.out, at + d, a.out_dtype)), "NaN was not passed on");
      }
  });
}

void run_all() {
  const std::vector<Case> cases = {
      {.size = {1, 2, 1, 70, 67, 32}, .causal = true, .shift = 1.0f},
      {.size = {2, 1, 1, 5, 130, 64}, .dtype = kBrain, .causal = true, .window = 20, .shift = 2.0f},
      {.size = {1, 3, 3, 66, 40, 24, 40}, .window = 9, .bias = true, .shift = -1.0f},
      {.size = {1, 4, 2, 33, 65, 64},
       .causal = true,
       .softcap = 3.0f,
       .sinks = true,
       .shift = 0.2f},
      {.size = {2, 4, 2, 9, 40, 56}, .sinks = true, .shift = 0.2f},
      {.size = {1, 2, 1, 34, 129, 120}, .softcap = 2.0f, .bias = true, .pad = 8, .shift = 0.2f},
      {.size = {2, 1, 1, 3, 70, 256, 130}, .shift = 1.0f},
      {.size = {1, 1, 1, 1, 600, 16}, .dtype = kBrain, .window = 30},
      {.size = {1, 2, 1, 20, 77, 37}, .causal = true, .sinks = true, .offset = 1, .pad = 3},
      {.size = {2, 1, 1, 4, 0, 16}, .softcap = 1.0f},
      {.size = {1, 1, 1, 64, 65, 32}, .causal = true},
      {.size = {1, 2, 1, 40, 70, 64}, .causal = true, .infinite_query = 45, .infinite_key = 66},
      {.size = {3, 4, 2, 70, 80, 64},
       .causal = true,
       .cu_q = {0, 1, 1, 70},
       .cu_k = {0, 7, 9, 80},
       .shift = 1.0f},
      {.size = {3, 2, 1, 40, 160, 40},
       .dtype = kBrain,
       .sinks = true,
       .cu_q = {0, 10, 30, 99},
       .cu_k = {-3, 0, 70, 999}},
  };
  for (const Case& c : cases) expect("attention_int8", "", 2, [&] { int8::run(c); });
}

}  // namespace int8

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
  bool steep = false;   // the first key far above the others, whose exponentials overflow beside it
};

void run(const Case& c) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size()), ld = c.depth + c.pad;
  const int64_t pages = c.page ? c.capacity / c.page : 1, page = c.page ? c.page : c.capacity;
  const int64_t keys = batch * pages * c.kv_heads * page;  // of all pages, one more of them unused
  std::vector<uint16_t> q_values = truth::halves(c.dtype, batch * c.heads * c.sq * c.depth);
  std::vector<uint16_t> k_values = truth::halves(c.dtype, keys * ld),
                        v_values = truth::halves(c.dtype, keys * ld);
  if (c.steep) {
    for (uint16_t& x : q_values) x = 0x4400;  // 4
    for (int64_t head = 0; head < batch * c.kv_heads; ++head)
      std::fill_n(k_values.begin() + head * page * ld, c.depth, uint16_t{0x4800});  // 8
    for (int64_t key = 0; key < keys; ++key) v_values[key * ld] = 0;
  }
  const Buffer<uint16_t> q(q_values), k(k_values), v(v_values);
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
      {2, 1, 1, 600, 64, {600}, kHalf, false, false, 0, 0, 0.0f, 0, false, true},
  };
  for (const Case& c : cases) expect("attention_decode", "", 2, [&] { run(c); });
}

}  // namespace decode

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
  rows::run_all();
  int8::run_all();
  decode::run_all();
  return check::result("attention_sm80, attention_int8_sm80, attention_decode_sm80");
}
