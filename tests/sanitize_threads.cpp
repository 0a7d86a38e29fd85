// Every parallel loop that a race could hide in, on std::thread (common/parallel_std.cpp) with odd
// shapes: what tools/sanitize.py runs under ThreadSanitizer. Torch's own pool is not instrumented.
#include <cstdio>
#include <cstring>
#include <vector>

#include "attention/attention.h"
#include "attention_decode/attention_decode.h"
#include "attention_int8/attention_int8.h"
#include "conv2d/conv2d.h"
#include "conv2d_int8/conv2d_int8.h"
#include "dequantize/dequantize.h"
#include "dequantize/dequantize_gguf.h"
#include "gated_act/gated_act.h"
#include "kv_append/kv_append.h"
#include "linear/linear.h"
#include "linear_grouped/linear_grouped_layout.h"
#include "linear_int8/linear_int8.h"
#include "norm/norm.h"
#include "pool/pool.h"
#include "quantize/quantize.h"
#include "rope/rope.h"

namespace narrowcast {
namespace {

constexpr int64_t kRows = 331, kColumns = 517, kOut = 259;

std::vector<float> floats(int64_t n) {
  std::vector<float> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(i * 7919 % 2003 - 1001) * 0.003f;
  return v;
}

// 64-byte aligned scratch, as the runs expect it.
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(bytes + 64) {}
  void* get() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  std::vector<char> memory;
};

std::vector<int8_t> codes(int64_t n) {
  std::vector<int8_t> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<int8_t>(i * 31 % 251 - 125);
  return v;
}

void quantisers(const std::vector<float>& x) {
  std::vector<int8_t> q(x.size());
  std::vector<float> scale(kRows);
  std::vector<int32_t> zero(kRows);
  const QuantizeRowsArgs a{x.data(), q.data(), scale.data(), zero.data(),    kRows,
                           kColumns, kColumns, kColumns,     DType::kFloat32};
  quantize_rows_run(a);
  quantize_static_run({x.data(), q.data(), kRows * kColumns, 0.05f, 3, DType::kFloat32, true});
  std::vector<float> y(x.size());
  const auto* bytes = reinterpret_cast<const uint8_t*>(q.data());
  dequantize_int8_run({q.data(), scale.data(), zero.data(), y.data(), kRows, kColumns, kColumns, 1,
                       false, DType::kFloat32});
  dequantize_groups_run(
      {bytes, x.data(), x.data(), y.data(), kRows, 512, 32, 4, DType::kFloat32, DType::kFloat32});
  dequantize_gguf_run({bytes, y.data(), kRows * 15, GgufType::kQ8_0, DType::kFloat32});
}

void rows(const std::vector<float>& x) {
  std::vector<float> y(x.size()), sum(x.size()), scale(kRows);
  std::vector<int8_t> q(x.size());
  NormArgs n{};
  n.x = n.residual = x.data(), n.weight = x.data(), n.q = q.data(), n.scale = scale.data();
  n.y = y.data(), n.sum = sum.data(), n.eps = 1e-5f, n.rms = true;
  n.rows = kRows, n.columns = n.ld_x = n.ld_residual = n.group = kColumns;
  norm_run(n);
  GatedActArgs g{};
  g.gate = g.up = x.data(), g.q = q.data(), g.scale = scale.data();
  g.rows = kRows, g.columns = g.ld_gate = g.ld_up = g.group = kColumns;
  g.activation = Activation::kSilu;
  gated_act_run(g);
  RopeArgs r{};
  r.x = x.data(), r.out = y.data(), r.cos = r.sin = x.data();
  r.batch = 3, r.heads = 5, r.length = 37, r.depth = 64, r.half = 32, r.table_rows = 37;
  r.stride_length = 64, r.stride_head = 64 * 37, r.stride_batch = 64 * 37 * 5;
  rope_run(r);
}

void products(const std::vector<float>& x) {
  const std::vector<int8_t> w_q = codes(kOut * kColumns), x_q = codes(kRows * kColumns);
  const std::vector<float> w = floats(kOut * kColumns), scale(kRows + kOut, 0.01f);
  std::vector<float> out(kRows * kOut);
  LinearArgs a;
  a.x = x.data(), a.w = w.data(), a.rows = kRows, a.columns = kOut;
  a.depth = a.ldx = a.ldw = kColumns, a.epilogue.out = out.data(), a.epilogue.ld_out = kOut;
  Scratch scratch(linear_scratch(kRows, kColumns));
  a.scratch = scratch.get();
  linear_run(a);
  LinearDynamicInt8Args d;
  d.x = x.data(), d.ldx = kColumns;
  d.linear.w = w_q.data(), d.linear.w_scale = scale.data(), d.linear.w_scale_stride = 1;
  d.linear.rows = kRows, d.linear.columns = kOut, d.linear.depth = d.linear.ldw = kColumns;
  d.linear.epilogue = a.epilogue;
  Scratch more(linear_dynamic_int8_scratch(kRows, kColumns, 0));
  d.linear.scratch = more.get();
  linear_dynamic_int8_run(d);
}

void grouped(const std::vector<float>& x) {
  constexpr int64_t depth = 512;
  const std::vector<int8_t> w = codes(kOut * depth / 2);
  std::vector<float> out(kRows * kOut);
  for (const int64_t rows : {int64_t{1}, int64_t{7}, kRows})
    for (const int activation_bits : {8, 16}) {
      LinearGroupedArgs a{};
      a.layout = grouped_layout(kOut, depth, 32, 4, false, true);
      a.x = x.data(), a.x_dtype = DType::kFloat32, a.m = rows;
      a.activation_bits = activation_bits;
      a.source = {reinterpret_cast<const uint8_t*>(w.data()), x.data(), x.data()};
      a.epilogue.out = out.data(), a.epilogue.ld_out = kOut;
      Scratch scratch(linear_grouped_scratch(a)), packed(grouped_packed_bytes(a.layout));
      linear_grouped_run(a, scratch.get());  // packs on the way
      auto* panels = static_cast<uint8_t*>(packed.get());
      grouped_pack_all(a.layout, a.source, panels);
      a.panels = panels;
      linear_grouped_run(a, scratch.get());
    }
}

void pools(const std::vector<int8_t>& x) {
  std::vector<int8_t> out(x.size());
  PoolArgs p;
  p.x = x.data(), p.images = 3, p.channels = 33, p.height = 31, p.width = 29;
  p.window.kernel[0] = p.window.kernel[1] = 3;
  p.out_height = 29, p.out_width = 27, p.is_signed = p.is_max = true;
  p.epilogue.out = out.data(), p.epilogue.ld_out = 33, p.epilogue.out_dtype = DType::kInt8;
  pool_run(p);
}

// Dense, depthwise and grouped convolutions of 3 x 3 taps, padded, over 3 images of 31 x 29.
void convolutions(const std::vector<float>& x, const std::vector<int8_t>& codes) {
  constexpr int64_t channels = 32, height = 31, width = 29;
  for (const int64_t groups : {int64_t{1}, int64_t{4}, channels}) {
    std::vector<float> out(3 * height * width * channels);
    Conv2dArgs a;
    a.x = x.data(), a.images = 3, a.channels = a.out_channels = channels, a.groups = groups;
    a.height = a.out_height = height, a.width = a.out_width = width;
    for (int d : {0, 1}) a.window.kernel[d] = 3, a.window.padding[d] = 1;
    a.linear = &linear_kernel();
    a.epilogue.out = out.data(), a.epilogue.ld_out = channels;
    Scratch packed(conv2d_packed_bytes(a)), scratch(conv2d_scratch(a));
    conv2d_pack(a, {x.data(), {channels / groups * 9, 9, 3, 1}}, packed.get());
    a.packed = packed.get(), a.scratch = scratch.get();
    conv2d_run(a);

    Conv2dInt8Args b{};
    b.shape = {3, height, width, channels, channels, 3, 3, 1, 1, 1, 1, 1, 1, groups, height, width};
    const Conv2dInt8Kernel& kernel = conv2d_int8_kernel();
    Scratch weights(conv2d_int8_packed_bytes(kernel, b.shape)),
        more(conv2d_int8_scratch(kernel, b.shape));
    const float scale = 0.01f;
    b.weights = conv2d_int8_pack(kernel, b.shape, codes.data(), &scale, 1, nullptr, 0.1f, 7, false,
                                 weights.get());
    b.epilogue.scale = b.weights.scale, b.epilogue.bias = b.weights.bias;
    b.epilogue.out = out.data(), b.epilogue.channels = channels;
    b.x = reinterpret_cast<const uint8_t*>(codes.data()), b.x_zero_point = 7;
    b.scratch = more.get();
    conv2d_int8_run(b);
  }
}

void attends(const std::vector<float>& x) {
  constexpr int64_t length = 67, heads = 6, depth = 33;
  std::vector<float> out(2 * heads * length * depth);
  AttentionArgs a{};
  a.q = a.k = a.v = x.data(), a.out = out.data();
  a.batch = 2, a.heads = heads, a.kv_heads = 3, a.sq = a.sk = length, a.depth = a.v_depth = depth;
  a.q_strides = a.out_strides = {heads * length * depth, length * depth, depth};
  a.k_strides = a.v_strides = {3 * length * depth, length * depth, depth};
  a.scale = 0.2f, a.causal = true;
  attention_run(a);

  Scratch workspace(attention_int8_workspace(a));
  attention_int8_run(attention_int8_args(a, workspace.get()));
}

// Appends to a cache of 1000 slots, then reads it: few queries in chunks, and many.
void decodes(const std::vector<float>& x) {
  constexpr int64_t capacity = 1000, heads = 6, kv_heads = 3, depth = 33, row = kv_heads * depth;
  std::vector<float> k(2 * capacity * row), v(k), out(2 * heads * 40 * depth);
  std::vector<int32_t> start{5, 700};
  for (const int64_t length : {int64_t{1}, int64_t{40}}) {
    KvAppendArgs n{};
    n.k = n.v = x.data(), n.k_cache = k.data(), n.v_cache = v.data(), n.start = start.data();
    for (int64_t (*strides)[3] : {&n.k_strides, &n.v_strides})
      (*strides)[0] = length * row, (*strides)[1] = length * depth, (*strides)[2] = depth;
    for (int64_t (*strides)[3] : {&n.k_cache_strides, &n.v_cache_strides})
      (*strides)[0] = capacity * row, (*strides)[1] = capacity * depth, (*strides)[2] = depth;
    n.batch = 2, n.heads = kv_heads, n.length = length, n.depth = depth, n.capacity = capacity;
    kv_append_run(n);

    const std::vector<int32_t> lengths{static_cast<int32_t>(5 + length),
                                       static_cast<int32_t>(700 + length)};
    AttentionDecodeArgs d{};
    AttentionArgs& a = d.attention;
    a.q = x.data(), a.k = k.data(), a.v = v.data(), a.out = out.data(), a.lengths = lengths.data();
    a.batch = 2, a.heads = heads, a.kv_heads = kv_heads, a.sq = length, a.sk = capacity;
    a.depth = a.v_depth = depth, a.scale = 0.2f, a.causal = true;
    a.q_strides = a.out_strides = {heads * length * depth, length * depth, depth};
    a.k_strides = a.v_strides = {capacity * row, capacity * depth, depth};
    d.capacity = capacity;
    std::vector<float> partials(attention_decode_partials(d));
    attention_decode_run(d, partials.data());
  }
}

}  // namespace
}  // namespace narrowcast

int main() {
  using namespace narrowcast;
  const std::vector<float> x = floats(kRows * kColumns);
  const std::vector<int8_t> image = codes(3 * 33 * 31 * 29);
  quantisers(x), rows(x), products(x), grouped(x), pools(image), convolutions(x, image);
  attends(x), decodes(x);
  std::puts("done");
}
