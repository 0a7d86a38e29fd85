// conv2d_int8 on sm_80 and later: an implicit matrix product on int8 tensor cores (mma m16n8k32),
// and depthwise layers by plain sums.
//
//   acc[p, o] = sum over taps and channels of x * w - x_zero_point * sum of w[o]: see
//   conv2d_int8.h.
//
// Work: rows are output pixels, columns output channels, K the taps times the channels of a group,
// each tap's channels filled up to 16 with weights of 0. Weights are first brought into the order
// [O][tap][channel] with their sums, by a kernel of its own. Padding reads 16 zero points from
// memory. K goes by in steps of 64 bytes through a ring of buffers (common/mma_tiles.cuh); the
// tile of sums leaves by way of shared memory.
// Depthwise: a thread has 16 channels of one output pixel.
//
// Numerics: exact int32; the epilogue's products and sums are those of conv2d_int8.h, compiled with
// --fmad=false: the same bits as the CPU kernels for none, relu, relu6 and hardswish.
// Cost: 2 O C KH KW / groups operations a pixel; depthwise layers are bound by memory.
//
// GATE conv_tile: spills = 0, contains LDSM.16.M88.4, registers <= 128
// GATE conv_tile.*Lb1ELb[01]E: contains IMMA.16832.S8.S8
// GATE conv_tile.*Lb0ELb[01]E: contains IMMA.16832.U8.S8
// GATE conv_tile.*Lb[01]ELb1E: contains LDGSTS.E.BYPASS.128
// GATE conv_depthwise: spills = 0, registers <= 128
// GATE conv_depthwise.*Lb1E: contains LDG.E.128
// GATE conv_pack: spills = 0
// GATE block: shared <= 68000
#include "common/epilogue.cuh"
#include "common/int8_operands.cuh"
#include "common/raster.cuh"
#include "common/vector8.cuh"
#include "conv2d_int8/conv2d_int8_cuda.h"

namespace narrowcast {
namespace {

constexpr int kThreads = 128;  // of the kernels without tiles

// The scratch: zero points of the image, [O] sums, then the weights.
struct Packed {
  uint8_t* zero_points;  // kChunk of them
  int32_t* sums;
  int8_t* weights;     // [O][tap][depth], or depthwise [tap][depth]
  int64_t depth, row;  // channels filled up; bytes of an output channel
};

using Large = Tile<128, 64, 4, 2, 4>;
using Small = Tile<64, 64, 2, 2, 4>;

template <class T>
union Shared {
  struct {
    alignas(128) int8_t x[T::kStages][T::kM][kStep];
    alignas(128) int8_t w[T::kStages][T::kN][kStep];
  } ring;
  alignas(128) int32_t sum[T::kM][T::kN + 4];  // + 4: neighbouring rows in other banks
};

// The epilogue of four channels o .. o + 3 of a pixel, `count` of which exist.
__device__ __forceinline__ void finish_conv(const Conv2dInt8CudaArgs& a, const int32_t (&acc)[4],
                                            int64_t pixel, int64_t o, int count) {
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = 0.0f;
    if (i >= count) continue;
    const int64_t at = pixel * a.shape.out_channels + o + i;
    v[i] = static_cast<float>(acc[i]) * (a.x_scale * a.w_scale[(o + i) * a.w_scale_stride]);
    v[i] = activate_device(a.activation, v[i] + (a.bias ? a.bias[o + i] : 0.0f));
    if (a.residual) {
      float r;
      if (a.residual_dtype == DType::kInt8)
        r = static_cast<float>(static_cast<const int8_t*>(a.residual)[at] - a.residual_zero_point);
      else if (a.residual_dtype == DType::kUInt8)
        r = static_cast<float>(static_cast<const uint8_t*>(a.residual)[at] - a.residual_zero_point);
      else
        r = load_float_device(a.residual, at, a.residual_dtype);
      v[i] = v[i] + r * a.residual_scale;
    }
    v[i] = activate_device(a.post_activation, v[i]);
  }
  Epilogue store;
  store.out = a.out, store.out_dtype = a.out_dtype, store.ld_out = a.shape.out_channels;
  store.out_scale = a.out_scale, store.out_zero_point = a.out_zero_point;
  finish_device(store, v, pixel, o, count);
}

// Weights in the order of the tiles, and their sums: a warp an output channel.
__global__ void __launch_bounds__(kThreads) conv_pack(Conv2dInt8CudaArgs a, Packed packed) {
  const Conv2dInt8Shape& s = a.shape;
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int64_t o = blockIdx.x * int64_t{kThreads / ptx::kWarp} + warp;
  if (blockIdx.x == 0 && threadIdx.x < kChunk)
    packed.zero_points[threadIdx.x] = static_cast<uint8_t>(a.x_zero_point);
  if (o >= s.out_channels) return;
  const int64_t taps = s.kernel_height * s.kernel_width, channels = s.channels / s.groups;
  const int8_t* w = a.w + o * channels * taps;
  int32_t sum = 0;
  for (int64_t i = lane; i < packed.row; i += ptx::kWarp) {
    const int64_t tap = i / packed.depth, c = i % packed.depth;
    const int8_t code = c < channels ? w[c * taps + tap] : static_cast<int8_t>(0);
    packed.weights[o * packed.row + i] = code;
    sum += code;
  }
#pragma unroll
  for (int mask = ptx::kWarp / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  if (lane == 0) packed.sums[o] = sum;
}

// Depthwise: [tap][channel].
__global__ void __launch_bounds__(kThreads)
    conv_pack_depthwise(Conv2dInt8CudaArgs a, Packed packed) {
  const int64_t taps = a.shape.kernel_height * a.shape.kernel_width;
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= taps * packed.depth) return;
  const int64_t tap = i / packed.depth, c = i % packed.depth;
  packed.weights[i] = c < a.shape.channels ? a.w[c * taps + tap] : static_cast<int8_t>(0);
}

// The pixels that a thread copies for its tile: where the first tap's window lies in x.
template <class T>
struct Pixels {
  static constexpr int kPixels = T::kM * kChunks / T::kThreads;  // that a thread copies
  int64_t image[kPixels];  // first element of the image; channels of the group
  int32_t y[kPixels], x[kPixels];

  __device__ __forceinline__ Pixels(const Conv2dInt8Shape& s, int64_t m0, int64_t channel) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int64_t m = m0 + threadIdx.x / kChunks + i * (T::kThreads / kChunks);
      const int64_t column = m % s.out_width, row = m / s.out_width % s.out_height;
      const int64_t n = m / s.out_width / s.out_height;
      image[i] = n * s.height * s.width * s.channels + channel;
      y[i] = static_cast<int32_t>(row * s.stride_h - s.padding_h);
      x[i] = static_cast<int32_t>(column * s.stride_w - s.padding_w);
      if (n >= s.batch) y[i] = -0x40000000;  // above every image
    }
  }
};

template <class T, bool kAligned>
__device__ __forceinline__ void copy_x(int8_t (&to)[T::kM][kStep], const Conv2dInt8CudaArgs& a,
                                       const Packed& packed, const Pixels<T>& pixels, int step) {
  const Conv2dInt8Shape& s = a.shape;
  const int chunk = threadIdx.x % kChunks, chunks = static_cast<int>(packed.depth / kChunk);
  const int at = step * kChunks + chunk, tap = at / chunks, c = at % chunks * kChunk;
  const int width = static_cast<int>(s.kernel_width), across = tap % width, down = tap / width;
  const int64_t left = s.channels / s.groups - c;
#pragma unroll
  for (int i = 0; i < Pixels<T>::kPixels; ++i) {
    const int row = threadIdx.x / kChunks + i * (T::kThreads / kChunks);
    const int64_t y = pixels.y[i] + down * s.dilation_h, x = pixels.x[i] + across * s.dilation_w;
    const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width && down < s.kernel_height;
    const uint8_t* source =
        inside ? a.x + pixels.image[i] + (y * s.width + x) * s.channels + c : packed.zero_points;
    int8_t* target = &to[row][place(row, chunk)];
    if constexpr (kAligned)
      ptx::cp_async_16(target, source);
    else
      ptx::store_shared_128(target, load_bytes(source, left));
  }
}

// One mma depth of the warp tile.
template <class T, bool kSigned>
__device__ __forceinline__ void multiply(int32_t (&sum)[T::kMmaM][T::kMmaN][4],
                                         const int8_t (&x)[T::kM][kStep],
                                         const int8_t (&w)[T::kN][kStep], int chunk0, int warp_m,
                                         int warp_n, int lane) {
  uint32_t a[T::kMmaM][4], b[T::kMmaN][2];
  load_fragments<T>(a, b, x, w, chunk0, warp_m, warp_n, lane);
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j) {
      if constexpr (kSigned)
        ptx::mma_s8_s8(sum[i][j], a[i], b[j]);
      else
        ptx::mma_u8_s8(sum[i][j], a[i], b[j]);
    }
}

template <class T, bool kSigned, bool kAligned>
__global__ void __launch_bounds__(T::kThreads, 2)
    conv_tile(Conv2dInt8CudaArgs args, Packed packed) {
  // setup
  Shared<T>& shared = ptx::shared_memory<Shared<T>>();
  const Conv2dInt8Shape& s = args.shape;
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int warp_m = warp / T::kWarpsN * T::kWarpM, warp_n = warp % T::kWarpsN * T::kWarpN;
  const int64_t rows = s.batch * s.out_height * s.out_width, columns = s.out_channels / s.groups;
  const TileOrigin origin = tile_origin(blockIdx.x, rows, columns, T::kM, T::kN);
  const int64_t m0 = origin.row, first = blockIdx.y * columns + origin.column;
  const Pixels<T> pixels(s, m0, blockIdx.y * (s.channels / s.groups));
  const int steps = static_cast<int>((packed.row + kStep - 1) / kStep);
  const Source w = {packed.weights + first * packed.row, packed.row, columns - origin.column,
                    packed.row};
  const auto load = [&](int step) {
    const int stage = step % T::kStages;
    copy_x<T, kAligned>(shared.ring.x[stage], args, packed, pixels, step);
    copy_rows<T::kN, T::kThreads, true>(shared.ring.w[stage], w, 0, step * kStep);
  };
  int32_t sum[T::kMmaM][T::kMmaN][4] = {};

  // load and compute
  through_ring<T::kStages>(steps, load, [&](int step) {
    const int stage = step % T::kStages;
#pragma unroll
    for (int part = 0; part < kStep / kMmaDepth; ++part)
      multiply<T, kSigned>(sum, shared.ring.x[stage], shared.ring.w[stage],
                           part * (kMmaDepth / kChunk), warp_m, warp_n, lane);
  });

  // into shared memory
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = warp_m + i * 16 + r / 2 * 8 + lane / 4;
        shared.sum[row][warp_n + j * 8 + lane % 4 * 2 + r % 2] = sum[i][j][r];
      }
  ptx::sync_threads();

  // finish and store: neighbouring threads, neighbouring channels
  for (int i = threadIdx.x; i < T::kM * (T::kN / 4); i += T::kThreads) {
    const int row = i / (T::kN / 4), column = i % (T::kN / 4) * 4;
    const int64_t exist = columns - origin.column - column;
    if (m0 + row >= rows || exist <= 0) continue;
    int32_t acc[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int32_t w_sum = e < exist ? packed.sums[first + column + e] : 0;
      acc[e] = shared.sum[row][column + e] - args.x_zero_point * w_sum;
    }
    finish_conv(args, acc, m0 + row, first + column, four_of(exist));
  }
}

template <bool kSigned, bool kAligned>
__global__ void __launch_bounds__(kThreads) conv_depthwise(Conv2dInt8CudaArgs args, Packed packed) {
  const Conv2dInt8Shape& s = args.shape;
  const int64_t chunks = packed.depth / kChunk;
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t pixel = i / chunks, c = i % chunks * kChunk, left = s.channels - c;
  const int64_t column = pixel % s.out_width, row = pixel / s.out_width % s.out_height;
  const int64_t n = pixel / s.out_width / s.out_height;
  if (n >= s.batch) return;
  int32_t acc[kChunk / 4][4] = {};
  for (int64_t down = 0; down < s.kernel_height; ++down)
    for (int64_t across = 0; across < s.kernel_width; ++across) {
      const int64_t y = row * s.stride_h - s.padding_h + down * s.dilation_h;
      const int64_t x = column * s.stride_w - s.padding_w + across * s.dilation_w;
      if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;  // the zero point, less itself
      const uint8_t* source = args.x + ((n * s.height + y) * s.width + x) * s.channels + c;
      const int8_t* weights = packed.weights + (down * s.kernel_width + across) * packed.depth + c;
      const ptx::Words4 w = ptx::load_global_128(weights);
      const ptx::Words4 v = kAligned ? ptx::load_global_128(source) : load_bytes(source, left);
#pragma unroll
      for (int word = 0; word < 4; ++word)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint8_t byte = static_cast<uint8_t>(v.word[word] >> e * 8);
          const int32_t value = kSigned ? static_cast<int8_t>(byte) : static_cast<int32_t>(byte);
          acc[word][e] += (value - args.x_zero_point) * static_cast<int8_t>(w.word[word] >> e * 8);
        }
    }
#pragma unroll
  for (int word = 0; word < 4; ++word)
    if (word * 4 < left)
      finish_conv(args, acc[word], pixel, c + word * 4, four_of(left - word * 4));
}

bool is_depthwise(const Conv2dInt8Shape& s) {
  return s.groups == s.channels && s.out_channels == s.channels && s.groups > 1;
}

Packed packed_at(const Conv2dInt8CudaArgs& a, void* scratch) {
  const Conv2dInt8Shape& s = a.shape;
  const auto whole = [](int64_t n) { return (n + kChunk - 1) / kChunk * kChunk; };
  Packed p;
  p.depth = whole(is_depthwise(s) ? s.channels : s.channels / s.groups);
  p.row = s.kernel_height * s.kernel_width * p.depth;
  p.zero_points = static_cast<uint8_t*>(scratch);
  p.sums = reinterpret_cast<int32_t*>(p.zero_points + kChunk);
  p.weights = reinterpret_cast<int8_t*>(p.zero_points + kChunk + whole(s.out_channels * 4));
  return p;
}

dim3 blocks_of(int64_t work, int64_t per_block, int64_t groups = 1) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  NC_CHECK(blocks <= 0x7fffffff && groups <= 65535, "conv2d_int8",
           "x_q must give at most 2^31 blocks and 65535 groups, got ", blocks, " and ", groups);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
}

template <class T, bool kAligned>
void launch_tiles(const Conv2dInt8CudaArgs& a, const Packed& packed, Stream stream) {
  const Conv2dInt8Shape& s = a.shape;
  const int64_t down = (s.batch * s.out_height * s.out_width + T::kM - 1) / T::kM;
  const int64_t across = (s.out_channels / s.groups + T::kN - 1) / T::kN;
  const auto run = [&](auto kernel) {
    launch("conv2d_int8", kernel, blocks_of(down * across, 1, s.groups), dim3(T::kThreads),
           sizeof(Shared<T>), stream, a, packed);
  };
  a.x_signed ? run(conv_tile<T, true, kAligned>) : run(conv_tile<T, false, kAligned>);
}

}  // namespace

int64_t conv2d_int8_sm80_scratch(const Conv2dInt8CudaArgs& a) {
  const Packed p = packed_at(a, nullptr);
  const int64_t rows = is_depthwise(a.shape) ? 1 : a.shape.out_channels;
  return reinterpret_cast<int64_t>(p.weights) + rows * p.row;
}

void conv2d_int8_sm80(const Conv2dInt8CudaArgs& a, void* scratch, Stream stream) {
  const Conv2dInt8Shape& s = a.shape;
  if (s.batch == 0 || s.out_channels == 0) return;
  constexpr int64_t kMost = int64_t{1} << 29;  // places in an image are counted in int32
  NC_CHECK(s.height + 2 * s.padding_h < kMost && s.width + 2 * s.padding_w < kMost, "conv2d_int8",
           "x_q must be smaller than 2^29 with its padding, got ", s.height, " x ", s.width,
           " with ", s.padding_h, " and ", s.padding_w);
  const Packed packed = packed_at(a, scratch);
  const bool aligned = is_aligned(a.x, 16) && s.channels % 16 == 0;
  if (is_depthwise(s)) {
    launch("conv2d_int8", conv_pack_depthwise, blocks_of(packed.row, kThreads), dim3(kThreads), 0,
           stream, a, packed);
    const auto run = [&](auto kernel) {
      const int64_t pixels = s.batch * s.out_height * s.out_width;
      launch("conv2d_int8", kernel, blocks_of(pixels * (packed.depth / kChunk), kThreads),
             dim3(kThreads), 0, stream, a, packed);
    };
    if (a.x_signed)
      aligned ? run(conv_depthwise<true, true>) : run(conv_depthwise<true, false>);
    else
      aligned ? run(conv_depthwise<false, true>) : run(conv_depthwise<false, false>);
    return;
  }
  launch("conv2d_int8", conv_pack, blocks_of(s.out_channels, kThreads / ptx::kWarp), dim3(kThreads),
         0, stream, a, packed);
  constexpr int64_t kFewTiles = 216;  // fewer leave some of an A100 idle
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const int64_t large = (pixels + Large::kM - 1) / Large::kM *
                        ((s.out_channels / s.groups + Large::kN - 1) / Large::kN) * s.groups;
  if (!aligned || s.channels / s.groups % kChunk)
    launch_tiles<Small, false>(a, packed, stream);
  else if (large < kFewTiles)
    launch_tiles<Small, true>(a, packed, stream);
  else
    launch_tiles<Large, true>(a, packed, stream);
}

}  // namespace narrowcast
