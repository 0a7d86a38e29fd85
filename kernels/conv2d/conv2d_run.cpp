// Selection, packing and the parallel loops: raw pointers in, no torch.
#include "conv2d/conv2d.h"

#include <algorithm>
#include <cstring>

#include "common/registry.h"
#include "common/scratch.h"
#include "common/tiles.h"

namespace narrowcast {
namespace {

constexpr Variant<const Conv2dKernel*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &conv2d_##name},
#include "conv2d/conv2d.inc"
#undef KERNEL
};
NC_VARIANT_LIST(conv2d, const Conv2dKernel*, kVariants)

constexpr int64_t kShared = 256;  // pixels up to which one gathered matrix serves all threads
constexpr int64_t kGathered = 256 << 10;  // bytes of gathered rows that stay in L2
constexpr int64_t kLeastRows = 12;
constexpr int64_t kDirectDepth = 160;  // taps * channels whose panel of weights stays in L1

int64_t bytes_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }
int64_t pixels(const Conv2dArgs& a) { return a.images * a.out_height * a.out_width; }
int64_t depth_of(const Conv2dArgs& a) {
  return a.channels / a.groups * a.window.kernel[0] * a.window.kernel[1];
}
const LinearFormat& format_of(const Conv2dArgs& a) { return linear_format(*a.linear, a.dtype); }

const void* advance(const void* p, int64_t elements, DType dtype) {
  return p ? static_cast<const char*>(p) + elements * bytes_of(dtype) : nullptr;
}

// The product of the rows [p0, ...) of group g, wherever they were gathered.
LinearArgs product(const Conv2dArgs& a, int64_t g, int64_t p0, int64_t rows) {
  const int64_t columns = a.out_channels / a.groups, n0 = g * columns;
  LinearArgs l;
  l.dtype = a.dtype, l.kernel = a.linear;
  l.rows = rows, l.columns = columns, l.depth = depth_of(a);
  l.packed =
      static_cast<const char*>(a.packed) + g * linear_packed_bytes(format_of(a), columns, l.depth);
  Epilogue& e = l.epilogue = a.epilogue;
  e.bias = advance(e.bias, n0, e.bias_dtype);
  e.residual = advance(e.residual, p0 * e.ld_residual + n0, e.residual_dtype);
  e.out = const_cast<void*>(advance(e.out, p0 * e.ld_out + n0, e.out_dtype));
  return l;
}

void run_shared(const Conv2dArgs& a, const Conv2dKernel& kernel) {
  const LinearFormat& format = format_of(a);
  const int64_t rows = pixels(a), ld = round_up(depth_of(a), format.depth_step);
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / 64 / std::max<int64_t>(ld, 1));
  for (int64_t g = 0; g < a.groups; ++g) {
    parallel_for(0, rows, grain, [&](int64_t p0, int64_t p1) {
      kernel.gather(a, g, p0, p1, format.x_dtype,
                    static_cast<char*>(a.scratch) + p0 * ld * bytes_of(format.x_dtype), ld);
    });
    LinearArgs l = product(a, g, 0, rows);
    // The rows already have the format's dtype and length.
    const int64_t bytes = linear_packed_bytes(format, std::min(l.columns, kLinearPanel), l.depth);
    l.x = a.scratch, l.ldx = ld;
    parallel_tiles(rows, l.columns, kLinearPanel, std::max<int64_t>(1, l.depth * 4),
                   [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
                     format.block(l, static_cast<const char*>(l.packed) + n0 / kLinearPanel * bytes,
                                  m0, m1, n0, static_cast<int>(n1 - n0));
                   });
  }
}

void run_gathered(const Conv2dArgs& a, const Conv2dKernel& kernel) {
  const LinearFormat& format = format_of(a);
  const int64_t rows = pixels(a), ld = round_up(depth_of(a), format.depth_step);
  const int64_t row_bytes = std::max<int64_t>(1, ld * bytes_of(format.x_dtype));
  const int64_t most = std::clamp(kGathered / row_bytes / 6 * 6, kLeastRows, kLinearBlock);
  const int64_t chunks = round_up((rows + most - 1) / most, thread_count());
  const int64_t chunk = (rows + chunks - 1) / chunks;
  const int64_t columns = a.out_channels / a.groups;
  const int64_t bytes = linear_packed_bytes(format, std::min(columns, kLinearPanel), depth_of(a));
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(chunk * row_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p0 = i * chunk, p1 = std::min(rows, p0 + chunk);
      for (int64_t g = 0; g < a.groups && p0 < p1; ++g) {
        kernel.gather(a, g, p0, p1, format.x_dtype, scratch.data(), ld);
        LinearArgs l = product(a, g, p0, p1 - p0);
        l.x = scratch.data(), l.ldx = ld;
        for (int64_t n0 = 0; n0 < columns; n0 += kLinearPanel)
          format.block(l, static_cast<const char*>(l.packed) + n0 / kLinearPanel * bytes, 0,
                       p1 - p0, n0, static_cast<int>(std::min(kLinearPanel, columns - n0)));
      }
    }
  });
}

}  // namespace

bool conv2d_is_depthwise(const Conv2dArgs& a) {
  return a.groups == a.channels && a.groups == a.out_channels && a.groups > 1;
}

bool conv2d_is_pointwise(const Conv2dArgs& a) {
  const Window& w = a.window;
  return a.groups == 1 && w.kernel[0] == 1 && w.kernel[1] == 1 && w.stride[0] == 1 &&
         w.stride[1] == 1 && a.out_height == a.height && a.out_width == a.width;
}

const char* conv2d_layout(const Conv2dArgs& a) {
  return conv2d_is_depthwise(a) ? "depthwise f32" : format_of(a).layout;
}

int64_t conv2d_packed_bytes(const Conv2dArgs& a) {
  if (conv2d_is_depthwise(a))
    return a.window.kernel[0] * a.window.kernel[1] * round_up(a.channels, kDepthwiseStep) * 4;
  return a.groups * linear_packed_bytes(format_of(a), a.out_channels / a.groups, depth_of(a));
}

void conv2d_pack(const Conv2dArgs& a, const Conv2dWeight& weight, void* packed) {
  const int64_t height = a.window.kernel[0], width = a.window.kernel[1], taps = height * width;
  const int64_t* s = weight.strides;
  if (conv2d_is_depthwise(a)) {
    const int64_t padded = round_up(a.channels, kDepthwiseStep);
    float* to = static_cast<float*>(packed);
    std::memset(to, 0, static_cast<size_t>(taps * padded) * sizeof(float));
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < a.channels; ++c)
        to[t * padded + c] =
            load_float(weight.data, c * s[0] + t / width * s[2] + t % width * s[3], a.dtype);
    return;
  }
  // [O][height][width][C / groups], the order in which the taps are gathered.
  const int64_t depth = depth_of(a), inner = a.channels / a.groups,
                columns = a.out_channels / a.groups, bytes = bytes_of(a.dtype);
  const ThreadScratch scratch(a.out_channels * depth * bytes);
  char* rows = static_cast<char*>(scratch.data());
  const char* from = static_cast<const char*>(weight.data);
  const auto reorder = [&]<class T>(T* to, const T* w) {
    parallel_for(0, a.out_channels, std::max<int64_t>(1, 16384 / std::max<int64_t>(depth, 1)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t o = begin; o < end; ++o)
                     for (int64_t t = 0; t < taps; ++t)
                       for (int64_t c = 0; c < inner; ++c)
                         to[o * depth + t * inner + c] =
                             w[o * s[0] + c * s[1] + t / width * s[2] + t % width * s[3]];
                 });
  };
  if (bytes == 4)
    reorder(reinterpret_cast<uint32_t*>(rows), reinterpret_cast<const uint32_t*>(from));
  else
    reorder(reinterpret_cast<uint16_t*>(rows), reinterpret_cast<const uint16_t*>(from));
  const LinearFormat& format = format_of(a);
  for (int64_t g = 0; g < a.groups; ++g)
    linear_pack(format, rows + g * columns * depth * bytes, a.dtype, depth, columns, depth,
                static_cast<char*>(packed) + g * linear_packed_bytes(format, columns, depth));
}

int64_t conv2d_scratch(const Conv2dArgs& a) {
  if (conv2d_is_depthwise(a)) return 0;
  if (conv2d_is_pointwise(a)) return linear_scratch(pixels(a), a.channels);
  return pixels(a) <= kShared ? pixels(a) * round_up(depth_of(a), 16) * 4 : 0;
}

void conv2d_run(const Conv2dArgs& a) {
  if (pixels(a) == 0 || a.out_channels == 0) return;
  const Conv2dKernel& kernel = *select_conv2d();
  if (conv2d_is_pointwise(a)) {
    LinearArgs l = product(a, 0, 0, pixels(a));
    l.x = a.x, l.ldx = a.channels, l.scratch = a.scratch;
    return linear_run(l);
  }
  if (kernel.direct && a.dtype == DType::kFloat32 && a.groups == 1 && a.window.dilation[1] == 1 &&
      depth_of(a) <= kDirectDepth && &format_of(a) == &linear_float32_avx512) {
    const int64_t work = std::max<int64_t>(1, a.out_width * depth_of(a) * a.out_channels);
    return parallel_for(0, a.images * a.out_height, std::max<int64_t>(1, (1 << 20) / work),
                        [&](int64_t begin, int64_t end) {
                          for (int64_t row = begin; row < end; ++row) kernel.direct(a, row);
                        });
  }
  if (!conv2d_is_depthwise(a))
    return pixels(a) <= kShared ? run_shared(a, kernel) : run_gathered(a, kernel);
  const int64_t cost = a.out_width * a.channels * (a.window.kernel[0] * a.window.kernel[1] + 4);
  parallel_for(0, a.images * a.out_height, std::max<int64_t>(1, (1 << 18) / cost),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) kernel.depthwise(a, row);
               });
}

}  // namespace narrowcast
