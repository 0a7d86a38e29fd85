// conv2d_int8_sm80.cu against sums in int64 and the scalar CPU epilogue: dense, grouped, depthwise.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "common/epilogue.h"
#include "conv2d_int8/conv2d_int8_cuda.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

constexpr auto kFloat = DType::kFloat32, kHalf = DType::kFloat16;

struct Size {
  int64_t batch, height, width, channels, out_channels, kernel_h, kernel_w, groups = 1;
};

struct Case {
  Size size;
  int64_t stride = 1, padding = 0, dilation = 1;
  bool is_signed = false, bias = false, one_scale = false;
  DType residual = DType::kOther, out = kFloat;
  Activation activation = Activation::kNone, post = Activation::kNone;
  size_t offset = 0;  // of x from an aligned address
};

int64_t size_of(DType t) { return t == kFloat ? 4 : t == kHalf || t == DType::kBFloat16 ? 2 : 1; }

template <class T>
std::vector<T> codes(int64_t count) {
  std::vector<T> v(count);
  for (T& x : v) x = static_cast<T>(emulator::random_number());
  return v;
}

std::vector<float> floats(int64_t count, float size) {
  std::vector<float> v(count);
  for (float& x : v) x = (static_cast<int>(emulator::random_number() % 2001) - 1000) * 1e-3f * size;
  return v;
}

void run(const Case& c) {
  const Size& z = c.size;
  Conv2dInt8CudaArgs a = {};
  Conv2dInt8Shape& s = a.shape;
  s.batch = z.batch, s.height = z.height, s.width = z.width, s.channels = z.channels;
  s.out_channels = z.out_channels, s.kernel_height = z.kernel_h, s.kernel_width = z.kernel_w;
  s.stride_h = s.stride_w = c.stride, s.padding_h = c.padding, s.padding_w = c.padding;
  s.dilation_h = s.dilation_w = c.dilation, s.groups = z.groups;
  s.out_height = (z.height + 2 * c.padding - c.dilation * (z.kernel_h - 1) - 1) / c.stride + 1;
  s.out_width = (z.width + 2 * c.padding - c.dilation * (z.kernel_w - 1) - 1) / c.stride + 1;
  const int64_t pixels = s.batch * s.out_height * s.out_width, count = pixels * z.out_channels;
  const int64_t per_group = z.channels / z.groups, taps = z.kernel_h * z.kernel_w;
  const Buffer<uint8_t> x(codes<uint8_t>(z.batch * z.height * z.width * z.channels), c.offset);
  const Buffer<int8_t> w(codes<int8_t>(z.out_channels * per_group * taps));
  const Buffer<float> w_scale(floats(c.one_scale ? 1 : z.out_channels, 0.02f));
  const Buffer<float> bias(floats(z.out_channels, 3.0f));
  const bool has_residual = c.residual != DType::kOther;
  std::vector<uint8_t> rest = codes<uint8_t>(count * size_of(c.residual));
  if (c.residual == kHalf)
    for (int64_t i = 0; i < count; ++i) store_float(rest.data(), i, kHalf, floats(1, 4.0f)[0]);
  const Buffer<uint8_t> residual(rest), out(count * size_of(c.out));
  a.x = x.data, a.w = w.data, a.w_scale = w_scale.data, a.w_scale_stride = !c.one_scale;
  a.bias = c.bias ? bias.data : nullptr, a.residual = has_residual ? residual.data : nullptr;
  a.out = out.data, a.x_scale = 0.03f, a.residual_scale = 0.05f, a.out_scale = 0.11f;
  a.x_zero_point = c.is_signed ? -7 : 113, a.residual_zero_point = 9;
  a.out_zero_point = c.out == DType::kUInt8 ? 120 : 3, a.x_signed = c.is_signed;
  a.residual_dtype = c.residual, a.out_dtype = c.out;
  a.activation = c.activation, a.post_activation = c.post;
  const Buffer<uint8_t> scratch(conv2d_int8_sm80_scratch(a));
  conv2d_int8_sm80(a, scratch.data, nullptr);

  std::vector<float> scales(z.out_channels), biases(z.out_channels);
  for (int64_t o = 0; o < z.out_channels; ++o) {
    scales[o] = a.x_scale * w_scale[c.one_scale ? 0 : o];
    biases[o] = c.bias ? bias[o] : 0.0f;
  }
  std::vector<uint8_t> expected(out.count);
  ConvEpilogue e = {};
  e.scale = scales.data(), e.bias = biases.data(), e.residual = a.residual, e.out = expected.data();
  e.residual_scale = a.residual_scale, e.inverse_out_scale = 1.0f / a.out_scale;
  e.residual_zero_point = a.residual_zero_point, e.out_zero_point = a.out_zero_point;
  e.residual_dtype = c.residual, e.out_dtype = c.out;
  e.activation = c.activation, e.post_activation = c.post, e.channels = z.out_channels;
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    for (int64_t o = 0; o < z.out_channels; ++o) {
      const int64_t group = o / (z.out_channels / z.groups);
      int64_t sum = 0;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t column = pixel % s.out_width, row = pixel / s.out_width % s.out_height;
        const int64_t y = row * c.stride - c.padding + tap / z.kernel_w * c.dilation;
        const int64_t xx = column * c.stride - c.padding + tap % z.kernel_w * c.dilation;
        if (y < 0 || y >= z.height || xx < 0 || xx >= z.width) continue;
        const int64_t n = pixel / s.out_width / s.out_height;
        for (int64_t k = 0; k < per_group; ++k) {
          const uint8_t byte =
              x[((n * z.height + y) * z.width + xx) * z.channels + group * per_group + k];
          const int64_t value = c.is_signed ? static_cast<int8_t>(byte) : byte;
          sum += (value - a.x_zero_point) * w[(o * per_group + k) * taps + tap];
        }
      }
      conv2d_int8_finish(e, static_cast<int32_t>(sum), pixel, o);
      for (int64_t i = 0; i < size_of(c.out); ++i) {
        const int64_t at = (pixel * z.out_channels + o) * size_of(c.out) + i;
        require(emulator::is_written(&out[at]), "an output was not written");
        require(out[at] == expected[at],
                "wrong bits at pixel " + std::to_string(pixel) + ", channel " + std::to_string(o));
      }
    }
}

}  // namespace

int main(int argc, char**) {
  check::quick = argc > 1;
  constexpr auto kByte = DType::kUInt8, kCode = DType::kInt8;
  const std::vector<Case> cases = {
      {.size = {1, 1, 1, 1, 1, 1, 1}},
      {.size = {2, 5, 7, 16, 20, 3, 3}, .padding = 1, .bias = true, .out = kByte},
      {.size = {1, 9, 8, 32, 70, 3, 2}, .stride = 2, .padding = 2, .is_signed = true},
      {.size = {1, 9, 9, 48, 5, 3, 3}, .dilation = 2, .residual = kByte, .post = Activation::kRelu},
      {.size = {1, 7, 6, 3, 17, 5, 3}, .stride = 2, .padding = 2, .bias = true, .out = kCode},
      {.size = {3, 4, 6, 80, 66, 1, 1}, .one_scale = true, .residual = kHalf, .out = kHalf},
      {.size = {1, 6, 5, 32, 64, 3, 3, 2}, .padding = 1, .activation = Activation::kRelu6},
      {.size = {1, 6, 5, 12, 18, 3, 3, 3}, .padding = 1, .is_signed = true, .residual = kCode},
      {.size = {1, 6, 5, 16, 9, 1, 3}, .offset = 1},
      {.size = {2, 6, 7, 32, 32, 3, 3, 32}, .padding = 1, .bias = true, .out = kByte},
      {.size = {1, 9, 8, 21, 21, 5, 3, 21}, .stride = 2, .padding = 2, .is_signed = true},
      {.size = {1, 9, 9, 16, 16, 3, 3, 16},
       .dilation = 2,
       .residual = kCode,
       .out = kCode,
       .activation = Activation::kHardswish},
      {.size = {1, 4, 4, 18, 18, 3, 3, 18}, .padding = 1, .is_signed = true, .out = kHalf},
      {.size = {1, 4, 4, 4, 8, 3, 3, 4}, .padding = 1},
  };
  for (const Case& c : cases) expect("conv2d_int8", "", 2, [&] { run(c); });
  const Case wide = {
      .size = {1, 4, 4, 16, 4, 3, 3}, .stride = int64_t{1} << 30, .padding = int64_t{1} << 29};
  expect("conv2d_int8, padding beyond int32", "exception", 1, [&] { run(wide); });
  // At least 216 large tiles.
  const std::vector<Case> large = {
      {.size = {1, 64, 108, 16, 250, 1, 1}, .bias = true, .out = kByte},
      {.size = {1, 64, 108, 16, 200, 1, 1}, .is_signed = true},
  };
  if (!check::quick)
    for (const Case& c : large) expect("conv2d_int8, large tiles", "", 1, [&] { run(c); });
  return check::result("conv2d_int8_sm80");
}
