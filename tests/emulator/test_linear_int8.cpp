// linear_int8_sm80.cu against the scalar CPU kernel, over every tile, odd shapes and every
// epilogue.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "linear_int8/linear_int8_cuda.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

struct Case {
  int64_t m, n, k;
  int64_t pad = 0;    // between rows of x and w
  size_t offset = 0;  // of x from an aligned address
  int64_t group = 0;
  bool zero_point = false, bias = false, residual = false, one_scale = false;
  DType out = DType::kFloat32, extra = DType::kFloat32;  // of y; of bias and residual
  Activation activation = Activation::kNone, post = Activation::kNone;
};

int64_t size_of(DType t) {
  return t == DType::kFloat32 ? 4 : t == DType::kFloat16 || t == DType::kBFloat16 ? 2 : 1;
}

float small_number() { return (static_cast<int>(emulator::random_number() % 2001) - 1000) * 1e-3f; }

std::vector<int8_t> codes(int64_t count) {
  std::vector<int8_t> v(count);
  for (int8_t& x : v) x = static_cast<int8_t>(emulator::random_number());
  return v;
}

std::vector<uint8_t> floats(DType dtype, int64_t count) {
  std::vector<uint8_t> bytes(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) store_float(bytes.data(), i, dtype, small_number() * 5.0f);
  return bytes;
}

// Whether the epilogue's bits are promised, see the contract.
bool exact(const Case& c) {
  return c.group == 0 && c.activation <= Activation::kRelu6 && c.post <= Activation::kRelu6;
}

float value(const void* p, int64_t i, DType dtype) {
  if (dtype == DType::kInt8) return static_cast<const int8_t*>(p)[i];
  if (dtype == DType::kUInt8) return static_cast<const uint8_t*>(p)[i];
  return load_float(p, i, dtype);
}

void run(const Case& c) {
  const int64_t ld = c.k + c.pad, groups = c.group ? c.k / c.group : 1;
  const Buffer<int8_t> x(codes(c.m * ld), c.offset), w(codes(c.n * ld));
  std::vector<float> x_scales(c.one_scale ? 1 : c.m * groups), w_scales(c.one_scale ? 1 : c.n);
  for (float& s : x_scales) s = small_number() * 0.01f;
  for (float& s : w_scales) s = small_number() * 0.01f;
  std::vector<int32_t> zeros(c.m);
  for (int32_t& z : zeros) z = static_cast<int32_t>(emulator::random_number() % 256) - 128;
  const Buffer<float> x_scale(x_scales), w_scale(w_scales);
  const Buffer<int32_t> zero(zeros);
  const Buffer<uint8_t> bias(floats(c.extra, c.n)), residual(floats(c.extra, c.m * c.n));
  const Buffer<uint8_t> y(c.m * c.n * size_of(c.out));

  LinearInt8Args a;
  a.x = x.data, a.w = w.data, a.ldx = a.ldw = ld;
  a.x_scale = x_scale.data, a.w_scale = w_scale.data;
  a.x_scale_stride = c.one_scale ? 0 : groups, a.w_scale_stride = c.one_scale ? 0 : 1;
  if (c.zero_point) a.x_zero_point = zero.data;
  a.rows = c.m, a.columns = c.n, a.depth = c.k, a.group = c.group;
  Epilogue& e = a.epilogue;
  if (c.bias) e.bias = bias.data;
  if (c.residual) e.residual = residual.data;
  e.bias_dtype = e.residual_dtype = c.extra;
  e.out = y.data, e.out_dtype = c.out, e.ld_out = e.ld_residual = c.n;
  e.activation = c.activation, e.post_activation = c.post;
  e.out_scale = 0.05f, e.out_zero_point = c.out == DType::kUInt8 ? 120 : 3;
  linear_int8_sm80(a, nullptr);

  std::vector<uint8_t> expected(y.count);
  e.out = expected.data();
  a.piece = c.group ? c.group : kLinearInt8Exact;
  a.pieces = (c.k + a.piece - 1) / a.piece;
  for (int64_t n0 = 0; n0 < c.n; n0 += kLinearInt8Panel) {
    const int columns = static_cast<int>(std::min(kLinearInt8Panel, c.n - n0));
    std::vector<uint8_t> panel(linear_int8_generic.panel_bytes(c.k) + 64);
    uint8_t* p = panel.data() + (64 - reinterpret_cast<uintptr_t>(panel.data()) % 64) % 64;
    linear_int8_generic.pack(w.data + n0 * ld, ld, columns, c.k, p);
    linear_int8_generic.block(a, p, 0, c.m, n0, columns);
  }
  double error = 0.0, norm = 0.0;
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    require(emulator::is_written(y.data + i * size_of(c.out)), "an output was not written");
    const float got = value(y.data, i, c.out), want = value(expected.data(), i, c.out);
    const std::string place = " at row " + std::to_string(i / c.n) + ", column " +
                              std::to_string(i % c.n) + ": " + std::to_string(got) +
                              " instead of " + std::to_string(want);
    if (exact(c)) require(std::memcmp(&got, &want, 4) == 0, "wrong bits" + place);
    error += (got - want) * (got - want), norm += want * want;
  }
  const double bound = c.out == DType::kFloat32 ? 2e-6 : 5e-3;
  require(std::sqrt(error) <= bound * std::sqrt(norm), "relative error over the bound");
}

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
  constexpr auto kHalf = DType::kFloat16, kBrain = DType::kBFloat16;
  std::vector<Case> cases = {
      {.m = 1, .n = 1, .k = 1},
      {.m = 5, .n = 70, .k = 100, .pad = 12, .bias = true, .residual = true},
      {.m = 16, .n = 64, .k = 512, .zero_point = true, .out = kHalf},
      {.m = 7, .n = 129, .k = 96, .group = 32, .bias = true, .out = kBrain},
      {.m = 65, .n = 67, .k = 33, .zero_point = true, .activation = Activation::kRelu},
      {.m = 17, .n = 66, .k = 208, .residual = true, .extra = kHalf, .post = Activation::kRelu6},
      {.m = 40, .n = 40, .k = 64, .offset = 1, .one_scale = true, .out = DType::kInt8},
      {.m = 64, .n = 64, .k = 320, .bias = true, .out = DType::kUInt8, .extra = kBrain},
      {.m = 33, .n = 100, .k = 192, .group = 64, .activation = Activation::kGelu},
      {.m = 130, .n = 70, .k = 352, .pad = 3, .group = 32, .out = kHalf},
      {.m = 20, .n = 24, .k = 65 * 1024 + 80, .zero_point = true},
      {.m = 2, .n = 9, .k = 200, .pad = 8, .activation = Activation::kSilu},
      {.m = 3,
       .n = 12,
       .k = 64,
       .activation = Activation::kHardswish,
       .post = Activation::kGeluTanh},
  };
  for (const Case& c : cases) expect("linear_int8", "", 2, [&] { run(c); });
  // At least 96 large tiles: few columns of K, many tiles.
  const std::vector<Case> large = {
      {.m = 129, .n = 48 * 128 - 5, .k = 48, .bias = true, .out = kHalf},
      {.m = 130, .n = 48 * 128, .k = 32, .zero_point = true},
      {.m = 257, .n = 32 * 128 - 60, .k = 64, .group = 32, .out = kBrain},
  };
  if (!check::quick)
    for (const Case& c : large) expect("linear_int8, large tiles", "", 1, [&] { run(c); });
  return check::result("linear_int8_sm80");
}
