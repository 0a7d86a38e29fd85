// attention_sm80.cu against float64: every depth, masks, bias, sinks, packed sequences, odd shapes.
#include "attention/attention_cuda.h"
#include "attention_truth.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

constexpr auto kHalf = DType::kFloat16, kBrain = DType::kBFloat16;

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

void run(const Case& c) {
  const Size& z = c.size;
  const int64_t dv = z.v_depth ? z.v_depth : z.depth, ld = z.depth + c.pad, ldv = dv + c.pad;
  const bool packed = !c.cu_q.empty();
  const int64_t outer = packed ? 1 : z.batch;
  const Buffer<uint16_t> q(truth::halves(c.dtype, outer * z.heads * z.sq * ld), c.offset);
  const Buffer<uint16_t> k(truth::halves(c.dtype, outer * z.kv_heads * z.sk * ld), c.offset);
  const Buffer<uint16_t> v(truth::halves(c.dtype, outer * z.kv_heads * z.sk * ldv), c.offset);
  const Buffer<uint16_t> bias(truth::halves(kHalf, z.heads * z.sq * z.sk));
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
  if (c.bias) {  // the same for all sequences
    a.bias = bias.data, a.bias_dtype = kHalf;
    a.bias_strides[1] = z.sq * z.sk, a.bias_strides[2] = z.sk, a.bias_strides[3] = 1;
  }
  if (c.sinks) a.sinks = sinks.data;
  if (c.lse) a.lse = lse.data;
  a.q_dtype = a.kv_dtype = a.out_dtype = c.dtype;
  a.scale = z.depth ? 1.0f / std::sqrt(static_cast<float>(z.depth)) : 1.0f;
  a.softcap = c.softcap, a.window = c.window, a.causal = c.causal;
  attention_sm80(a, nullptr);

  for (int64_t b = 0; b < z.batch; ++b) {
    const int64_t q0 = packed ? c.cu_q[b] : 0, k0 = packed ? c.cu_k[b] : 0;
    const int64_t sq = packed ? c.cu_q[b + 1] - q0 : z.sq, sk = packed ? c.cu_k[b + 1] - k0 : z.sk;
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

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
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
      {.size = {3, 4, 2, 70, 80, 64},
       .causal = true,
       .lse = true,
       .cu_q = {0, 1, 1, 70},
       .cu_k = {0, 7, 9, 80}},
      {.size = {2, 1, 1, 130, 66, 40}, .dtype = kBrain, .cu_q = {0, 64, 130}, .cu_k = {0, 65, 66}},
  };
  for (const Case& c : cases) expect("attention", "", 2, [&] { run(c); });
  return check::result("attention_sm80");
}
