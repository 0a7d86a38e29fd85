// norm_sm80.cu against sums in float64, over odd shapes, every form and rows that are not finite.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "common/epilogue.h"
#include "norm/norm_cuda.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

struct Case {
  int64_t rows, columns, pad = 0;  // pad: between rows of x and residual
  bool rms = true, residual = false, weight = true, bias = false;
  bool y = true, sum = false, q = false, hostile = false;
  int64_t group = 0;  // of q; 0: one scale a row
  size_t offset = 0;  // of x from an aligned address
  DType parameter = DType::kFloat32;
};

int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

std::vector<uint8_t> values(DType dtype, int64_t count, float shift) {
  std::vector<uint8_t> bytes(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i)
    store_float(bytes.data(), i, dtype,
                shift + (static_cast<int>(emulator::random_number() % 2001) - 1000) * 1e-3f);
  return bytes;
}

void run(DType dtype, const Case& c) {
  const int64_t ld = c.columns + c.pad, group = c.group ? c.group : c.columns;
  const int64_t groups = c.columns ? c.columns / group : !c.group;
  std::vector<uint8_t> content = values(dtype, c.rows * ld, 0.5f);
  if (c.hostile) {
    store_float(content.data(), 1 % c.columns, dtype, NAN);
    if (c.rows > 1) store_float(content.data(), ld + c.columns - 1, dtype, INFINITY);
  }
  const Buffer<uint8_t> x(content, c.offset * size_of(dtype));
  const Buffer<uint8_t> residual(values(dtype, c.rows * ld, 0.1f));
  const Buffer<uint8_t> weight(values(c.parameter, c.columns, 1.0f));
  const Buffer<uint8_t> bias(values(c.parameter, c.columns, 0.0f));
  const Buffer<uint8_t> y(c.rows * c.columns * size_of(dtype));
  const Buffer<uint8_t> sum(c.rows * c.columns * size_of(dtype));
  const Buffer<int8_t> q(c.rows * c.columns);
  const Buffer<float> scale(c.rows * groups);
  const Buffer<int64_t> findings(2);
  findings[0] = findings[1] = 0;
  emulator::mark_written(findings.data, 16);
  NormArgs a{};
  a.x = x.data, a.rows = c.rows, a.columns = c.columns, a.ld_x = a.ld_residual = ld;
  if (c.residual) a.residual = residual.data;
  if (c.weight) a.weight = weight.data;
  if (c.bias) a.bias = bias.data;
  if (c.y) a.y = y.data;
  if (c.sum) a.sum = sum.data;
  if (c.q) a.q = q.data, a.scale = scale.data;
  a.group = group, a.eps = 1e-3f, a.rms = c.rms, a.dtype = dtype, a.parameter_dtype = c.parameter;
  norm_sm80(a, findings.data, nullptr);

  const double unit = dtype == DType::kFloat32 ? 0.0 : dtype == DType::kFloat16 ? 5e-4 : 4e-3;
  int64_t nan = 0;
  std::vector<double> want(c.columns);
  for (int64_t m = 0; m < c.rows; ++m) {
    double mean = 0.0, square = 0.0;
    for (int64_t i = 0; i < c.columns; ++i) {
      float s = load_float(x.data, m * ld + i, dtype);
      if (c.residual) s = s + load_float(residual.data, m * ld + i, dtype);
      want[i] = s;
      if (!c.rms) mean += s / static_cast<double>(c.columns);
      if (!c.sum) continue;
      uint8_t expected[4];
      store_float(expected, 0, dtype, s);
      const uint8_t* got = sum.data + (m * c.columns + i) * size_of(dtype);
      require(emulator::is_written(got), "a sum was not written");
      require(s != s || !std::memcmp(got, expected, size_of(dtype)), "wrong sum");
    }
    for (const double s : want) square += (s - mean) * (s - mean);
    const double spread = std::sqrt(square / static_cast<double>(c.columns) + a.eps);
    for (int64_t i = 0; i < c.columns; ++i) {
      want[i] = std::isfinite(square) ? (want[i] - mean) / spread : NAN;
      if (c.weight) want[i] *= load_float(weight.data, i, c.parameter);
      if (c.bias) want[i] += load_float(bias.data, i, c.parameter);
      nan += c.q && std::isnan(want[i]);
      if (!c.y) continue;
      const int64_t at = m * c.columns + i;
      require(emulator::is_written(y.data + at * size_of(dtype)), "a result was not written");
      const double got = load_float(y.data, at, dtype);
      require(std::isnan(want[i]) ? std::isnan(got)
                                  : std::abs(got - want[i]) <= 2e-6 + unit * std::abs(want[i]),
              "wrong y: " + std::to_string(got) + " instead of " + std::to_string(want[i]));
    }
    for (int64_t g = 0; c.q && g < groups; ++g) {
      double top = 0.0;
      for (int64_t i = g * group; i < (g + 1) * group; ++i) top = std::fmax(top, std::abs(want[i]));
      const double expected = top > 0.0 ? top / 127 : 1.0, got = scale[m * groups + g];
      require(emulator::is_written(&scale[m * groups + g]), "a scale was not written");
      require(std::abs(got - expected) <= 3e-6 * expected, "wrong scale");
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        const int8_t* code = &q[m * c.columns + i];
        require(emulator::is_written(code), "a code was not written");
        require(std::isnan(want[i]) ? *code == 0
                                    : std::abs(*code * got - want[i]) <= 0.5001 * expected + 4e-6,
                "wrong code");
      }
    }
  }
  require(findings[0] == nan && findings[1] == nan, "wrong findings");
}

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
  constexpr auto kHalf = DType::kFloat16, kBrain = DType::kBFloat16;
  const Case cases[] = {
      {.rows = 3, .columns = 8},
      {.rows = 9, .columns = 1, .rms = false, .q = true},
      {.rows = 5, .columns = 67, .pad = 5, .residual = true, .sum = true, .parameter = kHalf},
      {.rows = 3, .columns = 264, .pad = 8, .rms = false, .bias = true, .parameter = kBrain},
      {.rows = 2, .columns = 96, .residual = true, .y = false, .sum = true, .q = true, .group = 32},
      {.rows = 10, .columns = 72, .rms = false, .residual = true, .q = true, .group = 24},
      {.rows = 3, .columns = 70, .bias = true, .y = false, .q = true, .hostile = true, .group = 14},
      {.rows = 2, .columns = 40, .rms = false, .weight = false, .bias = true, .offset = 1},
      {.rows = 2, .columns = 2056, .residual = true, .sum = true, .q = true},
      {.rows = 2, .columns = 1027, .rms = false, .residual = true, .q = true, .hostile = true},
      {.rows = 1, .columns = 2304, .rms = false, .bias = true, .q = true, .group = 64},
      {.rows = 3, .columns = 1040, .q = true, .group = 520, .parameter = kHalf},
      {.rows = 4, .columns = 0, .q = true},
  };
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const Case& c : cases) expect("norm", "", 2, [&] { run(dtype, c); });
  return check::result("norm_sm80");
}
