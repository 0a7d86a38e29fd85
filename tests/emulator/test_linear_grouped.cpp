// linear_grouped_sm80.cu against sums in float64: every tile, both widths, split and whole K.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "linear_grouped/linear_grouped_cuda.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

constexpr auto kFloat = DType::kFloat32, kHalf = DType::kFloat16, kBrain = DType::kBFloat16;

struct Case {
  int64_t m, n, k, group = 32;
  int bits = 4;
  DType x = kHalf;
  bool half = true, offset = false, bias = false, residual = false;
  DType out = kFloat;
  Activation activation = Activation::kNone, post = Activation::kNone;
  bool split = false;  // whether K must be cut
};

int64_t size_of(DType t) { return t == kFloat ? 4 : 2; }

std::vector<uint8_t> floats(DType dtype, int64_t count, float size) {
  std::vector<uint8_t> bytes(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i)
    store_float(bytes.data(), i, dtype,
                (static_cast<int>(emulator::random_number() % 2001) - 1000) * 1e-3f * size);
  return bytes;
}

void run(const Case& c) {
  const int64_t groups = c.k / c.group, row_bytes = c.k * c.bits / 8;
  const DType scales = c.half ? kHalf : kFloat;
  std::vector<uint8_t> bytes(c.n * row_bytes);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(emulator::random_number());
  const Buffer<uint8_t> codes(bytes), x(floats(c.x, c.m * c.k, 1.0f));
  const Buffer<uint8_t> scale(floats(scales, c.n * groups, c.bits == 4 ? 0.1f : 0.01f));
  const Buffer<uint8_t> offset(floats(scales, c.n * groups, 0.5f));
  const Buffer<uint8_t> bias(floats(kFloat, c.n, 1.0f)), residual(floats(kHalf, c.m * c.n, 1.0f));
  const Buffer<uint8_t> y(c.m * c.n * size_of(c.out));

  LinearGroupedArgs a = {};
  GroupedLayout& l = a.layout;
  l.n = c.n, l.k = c.k, l.group = c.group, l.bits = c.bits, l.half = c.half;
  a.x = x.data, a.x_dtype = c.x, a.m = c.m, a.activation_bits = 16;
  a.source = {codes.data, scale.data, c.offset ? offset.data : nullptr};
  Epilogue& e = a.epilogue;
  if (c.bias) e.bias = bias.data;
  if (c.residual) e.residual = residual.data, e.residual_dtype = kHalf;
  e.out = y.data, e.out_dtype = c.out, e.ld_out = e.ld_residual = c.n;
  e.activation = c.activation, e.post_activation = c.post;
  const int64_t count = linear_grouped_sm80_partials(a);
  require((count > 0) == c.split, "K is cut where it should not be, or the other way round");
  const Buffer<float> partials(count);
  linear_grouped_sm80(a, count ? partials.data : nullptr, nullptr);

  std::vector<float> expected(c.m * c.n);
  e.out = expected.data(), e.out_dtype = kFloat;
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0.0, size = 1e-3;
      for (int64_t k = 0; k < c.k; ++k) {
        const uint8_t byte = codes[n * row_bytes + k * c.bits / 8];
        const int code = c.bits == 8 ? static_cast<int8_t>(byte) : k % 2 ? byte >> 4 : byte & 15;
        const int64_t g = n * groups + k / c.group;
        const double s = load_float(scale.data, g, scales);
        const double o = c.offset ? load_float(offset.data, g, scales) : c.bits == 4 ? -8 * s : 0.0;
        const double product = load_float(x.data, m * c.k + k, c.x) * (code * s + o);
        sum += product, size += std::abs(product);
      }
      finish(e, static_cast<float>(sum), m, n);
      const int64_t i = m * c.n + n;
      require(emulator::is_written(y.data + i * size_of(c.out)), "an output was not written");
      const double got = load_float(y.data, i, c.out), want = expected[i];
      const double unit = c.out == kFloat ? 1e-6 : c.out == kHalf ? 5e-4 : 4e-3;
      require(std::abs(got - want) <= unit * std::abs(want) + 2e-6 * size,
              "row " + std::to_string(m) + ", column " + std::to_string(n) + ": " +
                  std::to_string(got) + " instead of " + std::to_string(want));
    }
}

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
  const std::vector<Case> cases = {
      // rows
      {.m = 1, .n = 1, .k = 32},
      {.m = 1, .n = 6, .k = 4160, .offset = true, .bias = true},
      {.m = 2, .n = 5, .k = 192, .group = 64, .bits = 8, .x = kBrain, .offset = true},
      {.m = 3, .n = 9, .k = 96, .group = 96, .half = false, .residual = true},
      {.m = 4, .n = 4, .k = 2144, .bits = 8, .out = kHalf},
      {.m = 9, .n = 7, .k = 64, .x = kFloat, .offset = true},
      {.m = 1, .n = 3, .k = 128, .group = 128, .bits = 8, .x = kFloat, .half = false},
      // tiles of 16 and 64 rows
      {.m = 5, .n = 70, .k = 96, .group = 96, .offset = true, .bias = true, .residual = true},
      {.m = 16, .n = 64, .k = 608, .x = kBrain, .out = kBrain, .activation = Activation::kRelu},
      {.m = 13, .n = 31, .k = 576, .bits = 8, .x = kBrain, .offset = true},
      {.m = 7, .n = 66, .k = 256, .group = 128, .bits = 8, .half = false, .out = kHalf},
      {.m = 17, .n = 67, .k = 352, .offset = true, .post = Activation::kRelu6},
      {.m = 65, .n = 30, .k = 320, .group = 64, .bits = 8, .half = false, .offset = true},
      {.m = 70, .n = 129, .k = 64, .group = 64, .x = kBrain, .activation = Activation::kSilu},
      // K in pieces
      {.m = 6, .n = 10, .k = 1152, .group = 96, .offset = true, .bias = true, .split = true},
      {.m = 20, .n = 33, .k = 1056, .bits = 8, .x = kBrain, .residual = true, .split = true},
      {.m = 8, .n = 64, .k = 1024, .split = true},  // the sums of a whole block, no thread to spare
  };
  for (const Case& c : cases) expect("linear_grouped", "", 2, [&] { run(c); });
  // At least 96 large tiles: few columns of K, many tiles.
  const std::vector<Case> large = {
      {.m = 129, .n = 48 * 128 - 5, .k = 32, .bias = true, .out = kHalf},
      {.m = 130, .n = 48 * 128, .k = 64, .bits = 8, .x = kBrain, .offset = true, .out = kBrain},
  };
  if (!check::quick)
    for (const Case& c : large) expect("linear_grouped, large tiles", "", 1, [&] { run(c); });
  return check::result("linear_grouped_sm80");
}
