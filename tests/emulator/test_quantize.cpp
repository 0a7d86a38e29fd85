// quantize_sm80.cu against the scalar CPU kernel: the same bits, over odd shapes and hostile
// values.
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "common/epilogue.h"
#include "quantize/quantize_cuda.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

std::vector<uint8_t> values(DType dtype, int64_t count, bool hostile) {
  std::vector<uint8_t> bytes(count * (dtype == DType::kFloat32 ? 4 : 2));
  for (int64_t i = 0; i < count; ++i) {
    float v = (static_cast<int>(emulator::random_number() % 20001) - 10000) * 3.7e-4f;
    const uint32_t kind = emulator::random_number() % 64;
    if (hostile && kind < 3) v = kind == 0 ? NAN : kind == 1 ? INFINITY : -INFINITY;
    if (dtype == DType::kFloat32) {
      std::memcpy(&bytes[i * 4], &v, 4);
    } else {
      const uint16_t h = dtype == DType::kFloat16 ? to_float16(v) : to_bfloat16(v);
      std::memcpy(&bytes[i * 2], &h, 2);
    }
  }
  return bytes;
}

struct Case {
  int64_t rows, columns, group, ld;
  bool asymmetric, hostile, offset;
};

void rows(DType dtype, const Case& c) {
  const int bytes = dtype == DType::kFloat32 ? 4 : 2;
  std::vector<uint8_t> content = values(dtype, c.rows * c.ld, c.hostile);
  for (int64_t row = 0; row < c.rows && c.columns; ++row)  // the extreme visits every warp
    store_float(content.data(), row * c.ld + row * 264 % c.columns, dtype, row % 2 ? 9.0f : -9.0f);
  const Buffer<uint8_t> x(content, c.offset ? bytes : 0);
  const int64_t units = c.rows * (c.columns ? c.columns / c.group : 1);
  const Buffer<int8_t> q(c.rows * c.columns);
  const Buffer<float> scale(units);
  const Buffer<int32_t> zero(units);
  const Buffer<int64_t> findings(2);
  findings[0] = findings[1] = 0;
  emulator::mark_written(findings.data, 16);
  quantize_rows_sm80({x.data, q.data, scale.data, c.asymmetric ? zero.data : nullptr, c.rows,
                      c.columns, c.ld, c.group, dtype},
                     findings.data, nullptr);
  QuantizeFindings found;
  std::vector<int8_t> expected(c.group);
  for (int64_t u = 0; u < units; ++u) {
    const int64_t groups = units / c.rows, row = u / groups, first = u % groups * c.group;
    float s;
    int32_t z = 0;
    quantize_generic.row(x.data + (row * c.ld + first) * bytes, dtype, c.group, c.asymmetric,
                         expected.data(), &s, &z, &found);
    require(emulator::is_written(&scale[u]) && scale[u] == s, "wrong scale");
    require(!c.asymmetric || zero[u] == z, "wrong zero point");
    for (int64_t i = 0; i < c.group; ++i) {
      const int8_t* got = &q[row * c.columns + first + i];
      require(emulator::is_written(got) && *got == expected[i], "wrong code");
    }
  }
  require(findings[0] == found.nan && (findings[1] == 0) == found.finite, "wrong findings");
}

void by_scale(DType dtype, int64_t count, bool is_signed, bool hostile, bool offset) {
  const Buffer<uint8_t> x(values(dtype, count, hostile),
                          offset ? (dtype == DType::kFloat32 ? 4 : 2) : 0);
  const Buffer<uint8_t> q(count);
  const Buffer<int64_t> findings(2);
  findings[0] = findings[1] = 0;
  emulator::mark_written(findings.data, 16);
  const float scale = 0.0173f;
  const int32_t zero = is_signed ? -9 : 117;
  quantize_static_sm80({x.data, q.data, count, scale, zero, dtype, is_signed}, findings.data,
                       nullptr);
  QuantizeFindings found;
  std::vector<uint8_t> expected(count);
  quantize_generic.by_scale(x.data, dtype, count, 1.0f / scale, zero, is_signed, expected.data(),
                            &found);
  for (int64_t i = 0; i < count; ++i)
    require(emulator::is_written(&q[i]) && q[i] == expected[i], "wrong code");
  require(findings[0] == found.nan && (findings[1] == 0) == found.finite, "wrong findings");
}

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
  const Case cases[] = {
      {9, 8, 8, 8, false, false, false},         {5, 1, 1, 1, false, true, false},
      {3, 67, 67, 70, true, true, false},        {2, 96, 32, 104, false, true, false},
      {9, 2056, 2056, 2056, false, true, false}, {2, 2051, 2051, 2051, true, true, false},
      {4, 256, 64, 256, false, false, true},     {17, 264, 264, 272, true, true, false},
      {1, 4104, 4104, 4104, true, false, true},  {6, 0, 0, 0, false, false, false},
  };
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const Case& c : cases) expect("rows", "", 2, [&] { rows(dtype, c); });
    for (const int64_t count : {1, 8, 2048, 4099})
      for (const bool is_signed : {false, true})
        expect("by scale", "", 2, [&] {
          by_scale(dtype, count, is_signed, true, false);
          by_scale(dtype, count, is_signed, false, true);
        });
  }
  return check::result("quantize_sm80");
}
