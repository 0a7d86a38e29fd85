// quantize on sm_80 and later: rows or groups of rows to int8, and values by a given scale.
//
//   scale = max |x| / 127, q = saturate(round_half_even(x * (1 / scale))), and so on: see
//   quantize.h.
//
// Work: a unit (a row, or a group of one) belongs to a warp when short, to a block when long. Its
// values are read twice, the second time from cache: 8 values a thread and step, in loads of 128
// bits where rows allow it. Numerics: the bits of the CPU kernels. Compiled with --fmad=false;
// divisions are exact. Cost: one read of x, one write of q; bound by memory.
//
// GATE quantize_: registers <= 40, spills = 0
// GATE quantize_.*Lb1E: contains LDG.E.128 STG.E.64
// GATE block: shared <= 64
#include "common/vector8.cuh"
#include "quantize/quantize_cuda.h"
#include "quantize/quantize_device.cuh"

namespace narrowcast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / ptx::kWarp;
constexpr int64_t kLongUnit = 2048;  // from here on a block is worth its barrier

struct Range {
  float low = 0.0f, high = 0.0f;
  __device__ void include(float l, float h) {
    low = l < low ? l : low;
    high = h > high ? h : high;
  }
};

struct Shared {
  float low[kWarps], high[kWarps];
};

// kUnit: the threads that share a unit, a warp or the block.
template <DType kType, int kUnit, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(QuantizeRowsArgs args, int64_t groups, int64_t* findings) {
  // setup
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int64_t unit = blockIdx.x * int64_t{kThreads / kUnit} + threadIdx.x / kUnit;
  if (unit >= args.rows * groups) return;  // a whole warp, or nobody
  const int64_t row = unit / groups, first = unit % groups * args.group;
  const void* x = static_cast<const char*>(args.x) + (row * args.ld_x + first) * kBytesOf<kType>;
  int8_t* q = args.q + row * args.columns + first;
  const int64_t begin = threadIdx.x % kUnit * kVector;

  // range of the finite values
  Range range;
  int64_t nan = 0, not_finite = 0;
  for (int64_t i = begin; i < args.group; i += kUnit * kVector) {
    float v[kVector];
    load_vector<kType, kAligned>(x, i, args.group, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (is_finite(v[e]))
        range.include(v[e], v[e]);
      else
        ++not_finite, nan += v[e] != v[e];
    }
  }
  if (not_finite) {
    ptx::atomic_add(findings, nan);
    ptx::atomic_add(findings + 1, not_finite);
  }
#pragma unroll
  for (int mask = ptx::kWarp / 2; mask > 0; mask /= 2)
    range.include(ptx::shuffle_xor(range.low, mask), ptx::shuffle_xor(range.high, mask));
  if constexpr (kUnit > ptx::kWarp) {
    Shared& shared = ptx::shared_memory<Shared>();
    if (lane == 0) shared.low[warp] = range.low, shared.high[warp] = range.high;
    ptx::sync_threads();
#pragma unroll
    for (int other = 0; other < kWarps; ++other)
      range.include(shared.low[other], shared.high[other]);
  }

  // scale
  const bool asymmetric = args.zero_point != nullptr;
  float scale = asymmetric ? range.high / 255.0f - range.low / 255.0f
                           : (-range.low > range.high ? -range.low : range.high) / 127.0f;
  if (!(scale >= kSmallestNormal)) scale = 1.0f;
  const float inverse = 1.0f / scale;
  const int32_t zero = asymmetric ? rounded(-128.0f - range.low * inverse) : 0;
  const int32_t lowest = asymmetric ? -128 : -127;
  if (begin == 0) {
    args.scale[unit] = scale;
    if (asymmetric) args.zero_point[unit] = zero;
  }

  // codes
  for (int64_t i = begin; i < args.group; i += kUnit * kVector) {
    float v[kVector];
    int32_t code[kVector];
    load_vector<kType, kAligned>(x, i, args.group, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      code[e] = clamped(rounded(v[e] * inverse) + zero, lowest, 127);
    store_codes<kAligned>(q, i, args.group, code);
  }
}

template <DType kType, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_by_scale(QuantizeStaticArgs args, float inverse, int64_t* findings) {
  const int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kVector;
  if (i >= args.count) return;
  const int32_t low = args.is_signed ? -127 : 0, high = args.is_signed ? 127 : 255;
  float v[kVector];
  int32_t code[kVector];
  int64_t nan = 0, not_finite = 0;
  load_vector<kType, kAligned>(args.x, i, args.count, v);
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (!is_finite(v[e])) ++not_finite, nan += v[e] != v[e];
    code[e] = clamped(rounded(v[e] * inverse) + args.zero_point, low, high);
  }
  store_codes<kAligned>(args.q, i, args.count, code);
  if (not_finite) {
    ptx::atomic_add(findings, nan);
    ptx::atomic_add(findings + 1, not_finite);
  }
}

dim3 blocks_of(const char* op, int64_t units, int64_t per_block) {
  const int64_t blocks = (units + per_block - 1) / per_block;
  NC_CHECK(blocks <= 0x7fffffff, op, "x must give at most 2^31 blocks, got ", blocks);
  return dim3(static_cast<unsigned>(blocks));
}

template <DType kType>
void launch_rows(const QuantizeRowsArgs& args, int64_t* findings, Stream stream) {
  // A row of no columns is one unit of no values, whose scale is 1.
  const int64_t groups = args.columns ? args.columns / args.group : args.group == 0;
  const bool vectors = is_aligned(args.x, 16) && args.ld_x * kBytesOf<kType> % 16 == 0 &&
                       args.group % kVector == 0 && args.columns % kVector == 0 &&
                       is_aligned(args.q, 8);
  if (groups == 0) return;
  const auto run = [&](auto kernel, int unit) {
    launch("quantize_int8", kernel, blocks_of("quantize_int8", args.rows * groups, kThreads / unit),
           dim3(kThreads), sizeof(Shared), stream, args, groups, findings);
  };
  if (args.group >= kLongUnit)
    vectors ? run(quantize_rows<kType, kThreads, true>, kThreads)
            : run(quantize_rows<kType, kThreads, false>, kThreads);
  else
    vectors ? run(quantize_rows<kType, ptx::kWarp, true>, ptx::kWarp)
            : run(quantize_rows<kType, ptx::kWarp, false>, ptx::kWarp);
}

template <DType kType>
void launch_static(const QuantizeStaticArgs& args, int64_t* findings, Stream stream) {
  const auto run = [&](auto kernel) {
    launch("quantize_int8_static", kernel,
           blocks_of("quantize_int8_static", args.count, kThreads * kVector), dim3(kThreads), 0,
           stream, args, 1.0f / args.scale, findings);
  };
  if (is_aligned(args.x, 16) && is_aligned(args.q, 8) && args.count % kVector == 0)
    run(quantize_by_scale<kType, true>);
  else
    run(quantize_by_scale<kType, false>);
}

}  // namespace

void quantize_rows_sm80(const QuantizeRowsArgs& args, int64_t* findings, Stream stream) {
  if (args.rows == 0) return;
  if (args.dtype == DType::kFloat32) return launch_rows<DType::kFloat32>(args, findings, stream);
  if (args.dtype == DType::kFloat16) return launch_rows<DType::kFloat16>(args, findings, stream);
  launch_rows<DType::kBFloat16>(args, findings, stream);
}

void quantize_static_sm80(const QuantizeStaticArgs& args, int64_t* findings, Stream stream) {
  if (args.count == 0) return;
  if (args.dtype == DType::kFloat32) return launch_static<DType::kFloat32>(args, findings, stream);
  if (args.dtype == DType::kFloat16) return launch_static<DType::kFloat16>(args, findings, stream);
  launch_static<DType::kBFloat16>(args, findings, stream);
}

}  // namespace narrowcast
