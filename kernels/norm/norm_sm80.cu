// Norms on sm_80 and later: rms and layer, with the residual sum before and the quantiser behind.
//
//   y = s / sqrt(mean(s^2) + eps) * weight, and so on: see norm.h.
//
// Work: a row belongs to a warp when short, to a block when long. Its values are read once from
// memory and then again from the L1 cache, 8 values a thread and step, in loads of 128 bits where
// rows allow it: once for the mean (layer), once for the squares, once for y, and twice for the
// range and the codes of q. Groups of a row are quantised by as many lanes as they have vectors.
// Numerics: sums in float32, each thread's own first, then across lanes and warps, in one fixed
// order; compiled with --fmad=false. Cost: one read of x and residual, one write of each result;
// bound by memory.
//
// GATE norm_rows: registers <= 80, spills = 0
// GATE norm_rows.*Lb1E: registers <= 64, contains LDG.E.128
// GATE block: shared <= 128
#include "common/vector8.cuh"
#include "norm/norm_cuda.h"
#include "quantize/quantize_device.cuh"

namespace narrowcast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / ptx::kWarp;
constexpr int64_t kLongRow = 1024;  // from here on a block is worth its barriers

// One line for each sum over the row: none is written twice, so each needs one barrier.
struct Shared {
  float mean[kWarps], square[kWarps], top[kWarps];
};

template <class Combine>
__device__ __forceinline__ float over_lanes(float v, int lanes, Combine combine) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) v = combine(v, ptx::shuffle_xor(v, mask));
  return v;
}

// Of all threads of a unit; every one of them gets the result.
template <int kUnit, class Combine>
__device__ __forceinline__ float over_unit(float v, float (&line)[kWarps], Combine combine) {
  v = over_lanes(v, ptx::kWarp, combine);
  if constexpr (kUnit > ptx::kWarp) {
    if (threadIdx.x % ptx::kWarp == 0) line[threadIdx.x / ptx::kWarp] = v;
    ptx::sync_threads();
    v = line[0];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) v = combine(v, line[other]);
  }
  return v;
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return b > a ? b : a; }
};

// A row as it is read, again in each pass.
template <DType kType, bool kAligned>
struct Row {
  const NormArgs& args;
  const void *x, *residual;

  // x, or x + residual.
  __device__ __forceinline__ void load_sum(int64_t i, float (&v)[kVector]) const {
    load_vector<kType, kAligned>(x, i, args.columns, v);
    if (!residual) return;
    float r[kVector];
    load_vector<kType, kAligned>(residual, i, args.columns, r);
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = v[e] + r[e];
  }
  __device__ __forceinline__ void load_parameter(const void* p, int64_t i,
                                                 float (&v)[kVector]) const {
    if (args.parameter_dtype == DType::kFloat32)
      load_vector<DType::kFloat32, kAligned>(p, i, args.columns, v);
    else if (args.parameter_dtype == DType::kFloat16)
      load_vector<DType::kFloat16, kAligned>(p, i, args.columns, v);
    else
      load_vector<DType::kBFloat16, kAligned>(p, i, args.columns, v);
  }
  __device__ __forceinline__ void load_y(int64_t i, float mean, float factor,
                                         float (&v)[kVector]) const {
    load_sum(i, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = (v[e] - mean) * factor;
    float p[kVector];
    if (args.weight) {
      load_parameter(args.weight, i, p);
#pragma unroll
      for (int e = 0; e < kVector; ++e) v[e] = v[e] * p[e];
    }
    if (args.bias) {
      load_parameter(args.bias, i, p);
#pragma unroll
      for (int e = 0; e < kVector; ++e) v[e] = v[e] + p[e];
    }
  }
};

struct Found {
  int64_t nan = 0, not_finite = 0;
};

// The largest finite |v| of a vector, `count` values of which exist.
__device__ __forceinline__ float largest(const float (&v)[kVector], int64_t count, Found& found) {
  float top = 0.0f;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (e >= count) continue;
    const float size = v[e] < 0 ? -v[e] : v[e];
    if (!is_finite(v[e]))
      ++found.not_finite, found.nan += v[e] != v[e];
    else
      top = size > top ? size : top;
  }
  return top;
}

template <bool kAligned>
__device__ __forceinline__ void store_quantised(int8_t* q, int64_t i, int64_t count, float inverse,
                                                const float (&v)[kVector]) {
  int32_t code[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) code[e] = clamped(rounded(v[e] * inverse), -127, 127);
  store_codes<kAligned>(q, i, count, code);
}

// kUnit: the threads that share a row, a warp or the block. group_lanes: those that share a group
// where a warp quantises it.
template <DType kType, int kUnit, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    norm_rows(NormArgs args, int64_t groups, int group_lanes, int64_t* findings) {
  // setup
  Shared& shared = ptx::shared_memory<Shared>();
  const int64_t at = blockIdx.x * int64_t{kThreads / kUnit} + threadIdx.x / kUnit;
  if (at >= args.rows) return;  // a whole warp, or nobody
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x % kUnit / ptx::kWarp;
  constexpr int64_t kBytes = kBytesOf<kType>;
  const Row<kType, kAligned> row = {
      args, static_cast<const char*>(args.x) + at * args.ld_x * kBytes,
      args.residual ? static_cast<const char*>(args.residual) + at * args.ld_residual * kBytes
                    : nullptr};
  char* sum = args.sum ? static_cast<char*>(args.sum) + at * args.columns * kBytes : nullptr;
  char* y = args.y ? static_cast<char*>(args.y) + at * args.columns * kBytes : nullptr;
  const int64_t begin = threadIdx.x % kUnit * kVector;
  constexpr int64_t kPass = int64_t{kUnit} * kVector;

  // mean, and the squares around it
  float total = 0.0f;
  for (int64_t i = begin; i < args.columns; i += kPass) {
    float v[kVector];
    row.load_sum(i, v);
    if (sum) store_vector<kType, kAligned>(sum, i, args.columns, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) total = total + (args.rms ? v[e] * v[e] : v[e]);
  }
  total = over_unit<kUnit>(total, shared.mean, Add{});
  float mean = 0.0f;
  if (!args.rms) {
    mean = total / static_cast<float>(args.columns);
    total = 0.0f;
    for (int64_t i = begin; i < args.columns; i += kPass) {
      float v[kVector];
      row.load_sum(i, v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float d = i + e < args.columns ? v[e] - mean : 0.0f;
        total = total + d * d;
      }
    }
    total = over_unit<kUnit>(total, shared.square, Add{});
  }
  // 1 / inf would turn what is finite in such a row into zeros that look like results.
  const float factor = is_finite(total)
                           ? 1.0f / sqrtf(total / static_cast<float>(args.columns) + args.eps)
                           : ptx::float_of_bits(0x7fc00000u);

  // y
  for (int64_t i = begin; y && i < args.columns; i += kPass) {
    float v[kVector];
    row.load_y(i, mean, factor, v);
    store_vector<kType, kAligned>(y, i, args.columns, v);
  }

  // q: the block a whole row, a warp as many groups as it has lanes for
  if (!args.scale) return;
  int8_t* q = args.q + at * args.columns;
  Found found;
  if (kUnit > ptx::kWarp && groups == 1) {
    float top = 0.0f;
    for (int64_t i = begin; i < args.columns; i += kPass) {
      float v[kVector];
      row.load_y(i, mean, factor, v);
      top = Larger{}(top, largest(v, args.columns - i, found));
    }
    const float scale = symmetric_scale(over_unit<kUnit>(top, shared.top, Larger{}));
    const float inverse = 1.0f / scale;
    if (begin == 0) args.scale[at] = scale;
    for (int64_t i = begin; i < args.columns; i += kPass) {
      float v[kVector];
      row.load_y(i, mean, factor, v);
      store_quantised<kAligned>(q, i, args.columns, inverse, v);
    }
  } else {
    const int64_t at_once = ptx::kWarp / group_lanes, step = int64_t{group_lanes} * kVector;
    for (int64_t g0 = warp * at_once; g0 < groups; g0 += kUnit / ptx::kWarp * at_once) {
      const int64_t group = g0 + lane / group_lanes, first = group * args.group;
      const int64_t end = group < groups ? first + args.group : 0;
      const int64_t start = first + lane % group_lanes * kVector;
      float top = 0.0f;
      for (int64_t i = start; i < end; i += step) {
        float v[kVector];
        row.load_y(i, mean, factor, v);
        top = Larger{}(top, largest(v, end - i, found));
      }
      const float scale = symmetric_scale(over_lanes(top, group_lanes, Larger{}));
      const float inverse = 1.0f / scale;
      if (start == first && group < groups) args.scale[at * groups + group] = scale;
      for (int64_t i = start; i < end; i += step) {
        float v[kVector];
        row.load_y(i, mean, factor, v);
        store_quantised<kAligned>(q, i, end, inverse, v);
      }
    }
  }
  if (found.not_finite) {
    ptx::atomic_add(findings, found.nan);
    ptx::atomic_add(findings + 1, found.not_finite);
  }
}

template <DType kType>
void launch_rows(const NormArgs& args, int64_t* findings, Stream stream) {
  // A row of no columns has no groups but, where it is one group itself, a scale.
  const int64_t groups = !args.scale         ? 0
                         : args.columns == 0 ? args.group == 0
                                             : args.columns / args.group;
  int lanes = 1;
  while (lanes < ptx::kWarp && lanes * kVector < args.group) lanes *= 2;
  const auto even = [](const void* p, int64_t ld) {
    return !p || (is_aligned(p, 16) && ld * kBytesOf<kType> % 16 == 0);
  };
  const bool vectors = args.columns % kVector == 0 && even(args.x, args.ld_x) &&
                       even(args.residual, args.ld_residual) && even(args.y, args.columns) &&
                       even(args.sum, args.columns) && is_aligned(args.weight, 16) &&
                       is_aligned(args.bias, 16) && is_aligned(args.q, 8) &&
                       (!args.q || args.group % kVector == 0);
  const auto run = [&](auto kernel, int unit) {
    const int64_t blocks = (args.rows + kThreads / unit - 1) / (kThreads / unit);
    NC_CHECK(blocks <= 0x7fffffff, "norm", "x must have at most 2^31 rows, got ", args.rows);
    launch("norm", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Shared),
           stream, args, groups, lanes, findings);
  };
  if (args.columns >= kLongRow)
    vectors ? run(norm_rows<kType, kThreads, true>, kThreads)
            : run(norm_rows<kType, kThreads, false>, kThreads);
  else
    vectors ? run(norm_rows<kType, ptx::kWarp, true>, ptx::kWarp)
            : run(norm_rows<kType, ptx::kWarp, false>, ptx::kWarp);
}

}  // namespace

void norm_sm80(const NormArgs& args, int64_t* findings, Stream stream) {
  if (args.rows == 0) return;
  if (args.dtype == DType::kFloat32) return launch_rows<DType::kFloat32>(args, findings, stream);
  if (args.dtype == DType::kFloat16) return launch_rows<DType::kFloat16>(args, findings, stream);
  launch_rows<DType::kBFloat16>(args, findings, stream);
}

}  // namespace narrowcast
