// linear_int8 on sm_80 and later: int8 tensor cores (mma m16n8k32), fed by asynchronous copies.
//
//   y[m, n] = epilogue(sum_k (x[m, k] - x_zero_point[m]) * w[n, k], scales): see linear_int8.h.
//
// Work: a block computes a tile kM x kN of y, its warps a grid of warp tiles. K goes by in steps of
// 64 bytes through a ring of buffers of shared memory (common/mma_tiles.cuh). After the loop the
// ring holds the tile times its scales in float32, from where rows leave in the order of memory.
//
// Numerics: int32 sums are exact; products and sums after them are those of linear_int8.h, compiled
// with --fmad=false: the same bits as the CPU kernels for none, relu and relu6 without groups.
// Cost: 2 M N K operations; bytes M K + N K per pass over the tiles.
//
// GATE linear_tile: spills = 0, contains IMMA.16832.S8.S8 LDSM.16.M88.4
// GATE linear_tile.*Li128E.*SumE[01]E: registers <= 128
// GATE linear_tile.*Li128E.*SumE2E: registers <= 200
// GATE linear_tile.*TileILi(64|16)E: registers <= 136
// GATE linear_tile.*Lb1E: contains LDGSTS.E.BYPASS.128
// GATE block: shared <= 68000
#include "common/epilogue.cuh"
#include "common/int8_operands.cuh"
#include "common/raster.cuh"
#include "linear_int8/linear_int8_cuda.h"

namespace narrowcast {
namespace {

enum class Sum {
  kInteger,    // one exact sum over all of K
  kZeroPoint,  // the same, minus x_zero_point times the sum of w
  kPieces      // float32 sum of exact pieces: groups, or K over 65536
};

using Large = Tile<128, 128, 2, 4, 4>;
using Medium = Tile<64, 64, 2, 2, 4>;
using Small = Tile<16, 64, 1, 4, 6>;  // few tokens: the bytes of w decide

template <class T>
union Shared {
  struct {
    alignas(128) int8_t x[T::kStages][T::kM][kStep];
    alignas(128) int8_t w[T::kStages][T::kN][kStep];
  } ring;
  alignas(128) float y[T::kM][T::kN + 4];  // + 4: neighbouring rows in other banks
};

// The registers of one warp.
template <class T, Sum kSum>
struct Accumulators {
  int32_t sum[T::kMmaM][T::kMmaN][4] = {};
  float pieces[kSum == Sum::kPieces ? T::kMmaM : 1][kSum == Sum::kPieces ? T::kMmaN : 1][4] = {};
  int32_t w_sum[T::kMmaN] = {};  // of column lane / 4 of each mma tile, this lane's share
};

// One mma depth of the warp tile.
template <class T, Sum kSum>
__device__ __forceinline__ void multiply(Accumulators<T, kSum>& acc,
                                         const int8_t (&x)[T::kM][kStep],
                                         const int8_t (&w)[T::kN][kStep], int chunk0, int warp_m,
                                         int warp_n, int lane, bool needs_w_sum) {
  uint32_t a[T::kMmaM][4], b[T::kMmaN][2];
  load_fragments<T>(a, b, x, w, chunk0, warp_m, warp_n, lane);
  if (kSum != Sum::kInteger && needs_w_sum) {
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j)
      acc.w_sum[j] = ptx::dp4a(b[j][1], 0x01010101u, ptx::dp4a(b[j][0], 0x01010101u, acc.w_sum[j]));
  }
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j) ptx::mma_s8_s8(acc.sum[i][j], a[i], b[j]);
}

// Adds the exact sums of one piece to the float32 sums, by the scale of its group, and starts anew.
template <class T, Sum kSum>
__device__ __forceinline__ void end_piece(Accumulators<T, kSum>& acc, const LinearInt8Args& args,
                                          int64_t m0, int64_t piece, int lane) {
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = m0 + i * 16 + half * 8 + lane / 4;
      const float scale =
          args.group && m < args.rows ? args.x_scale[m * args.x_scale_stride + piece] : 1.0f;
#pragma unroll
      for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int r = half * 2 + e;
          acc.pieces[i][j][r] = acc.pieces[i][j][r] + static_cast<float>(acc.sum[i][j][r]) * scale;
          acc.sum[i][j][r] = 0;
        }
    }
}

// What the compiler must leave room for: two blocks of large tiles hide each other's barriers,
// where their registers allow it.
constexpr int blocks_on_sm(int tile_rows, Sum sum) {
  return tile_rows == 128 && sum != Sum::kPieces ? 2 : 1;
}

template <class T, Sum kSum, bool kAligned>
__global__ void __launch_bounds__(T::kThreads, blocks_on_sm(T::kM, kSum))
    linear_tile(LinearInt8Args args) {
  // setup
  Shared<T>& shared = ptx::shared_memory<Shared<T>>();
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int warp_m = warp / T::kWarpsN * T::kWarpM, warp_n = warp % T::kWarpsN * T::kWarpN;
  const auto [m0, n0] = tile_origin(blockIdx.x, args.rows, args.columns, T::kM, T::kN);
  const Source x = {args.x, args.ldx, args.rows, args.depth};
  const Source w = {args.w, args.ldw, args.columns, args.depth};
  const int64_t steps = (args.depth + kStep - 1) / kStep;
  const auto load = [&](int64_t step) {
    const int stage = static_cast<int>(step % T::kStages);
    copy_rows<T::kM, T::kThreads, kAligned>(shared.ring.x[stage], x, m0, step * kStep);
    copy_rows<T::kN, T::kThreads, kAligned>(shared.ring.w[stage], w, n0, step * kStep);
  };
  Accumulators<T, kSum> acc;
  const bool needs_w_sum = args.x_zero_point != nullptr;
  int64_t piece = 0, left_in_piece = args.piece;

  // load and compute
  through_ring<T::kStages>(steps, load, [&](int64_t step) {
    const int stage = static_cast<int>(step % T::kStages);
#pragma unroll
    for (int part = 0; part < kStep / kMmaDepth; ++part) {
      multiply<T, kSum>(acc, shared.ring.x[stage], shared.ring.w[stage],
                        part * (kMmaDepth / kChunk), warp_m, warp_n, lane, needs_w_sum);
      if constexpr (kSum == Sum::kPieces) {
        left_in_piece -= kMmaDepth;
        if (left_in_piece == 0 && piece < args.pieces) {
          end_piece<T, kSum>(acc, args, m0 + warp_m, piece, lane);
          ++piece, left_in_piece = args.piece;
        }
      }
    }
  });
  if constexpr (kSum == Sum::kPieces)
    if (piece < args.pieces) end_piece<T, kSum>(acc, args, m0 + warp_m, piece, lane);

  // scale, into shared memory
  float w_scale[T::kMmaN][2];
  int32_t w_sum[T::kMmaN][2] = {};
#pragma unroll
  for (int j = 0; j < T::kMmaN; ++j) {
    if (kSum != Sum::kInteger && needs_w_sum) {
      int32_t sum = acc.w_sum[j] + ptx::shuffle_xor(acc.w_sum[j], 1);
      sum = sum + ptx::shuffle_xor(sum, 2);  // of column lane / 4, in its four lanes
#pragma unroll
      for (int e = 0; e < 2; ++e) w_sum[j][e] = ptx::shuffle(sum, (lane % 4 * 2 + e) * 4);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t n = n0 + warp_n + j * 8 + lane % 4 * 2 + e;
      w_scale[j][e] = n < args.columns ? args.w_scale[n * args.w_scale_stride] : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_m + i * 16 + half * 8 + lane / 4;
      const int64_t m = m0 + row;
      const bool exists = m < args.rows;
      const float x_scale = exists && !args.group ? args.x_scale[m * args.x_scale_stride] : 1.0f;
      const int32_t zero = exists && needs_w_sum ? args.x_zero_point[m] : 0;
#pragma unroll
      for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float v;
          if constexpr (kSum == Sum::kPieces) {
            v = acc.pieces[i][j][half * 2 + e];
            if (needs_w_sum) v = v - static_cast<float>(zero) * static_cast<float>(w_sum[j][e]);
          } else {
            v = static_cast<float>(acc.sum[i][j][half * 2 + e] - zero * w_sum[j][e]);
          }
          shared.y[row][warp_n + j * 8 + lane % 4 * 2 + e] = v * x_scale * w_scale[j][e];
        }
    }
  ptx::sync_threads();

  // finish and store: neighbouring threads, neighbouring columns
  for (int i = threadIdx.x; i < T::kM * (T::kN / 4); i += T::kThreads) {
    const int row = i / (T::kN / 4), column = i % (T::kN / 4) * 4;
    const int64_t m = m0 + row, n = n0 + column, exist = args.columns - n;
    if (m >= args.rows || exist <= 0) continue;
    float v[4] = {shared.y[row][column], shared.y[row][column + 1], shared.y[row][column + 2],
                  shared.y[row][column + 3]};
    finish_device(args.epilogue, v, m, n, four_of(exist));
  }
}

template <class T, bool kAligned>
void launch_tile(const LinearInt8Args& args, Stream stream) {
  const int64_t tiles = ((args.rows + T::kM - 1) / T::kM) * ((args.columns + T::kN - 1) / T::kN);
  NC_CHECK(tiles <= 0x7fffffff, "linear_int8", "x and w_q must give at most 2^31 tiles, got ",
           tiles);
  static_assert(sizeof(Shared<T>) <= 99 * 1024, "sm_86 has 99 KB a block");
  const auto run = [&](auto kernel) {
    launch("linear_int8", kernel, dim3(static_cast<unsigned>(tiles)), dim3(T::kThreads),
           sizeof(Shared<T>), stream, args);
  };
  if (args.group || args.depth > kLinearInt8Exact)
    run(linear_tile<T, Sum::kPieces, kAligned>);
  else if (args.x_zero_point)
    run(linear_tile<T, Sum::kZeroPoint, kAligned>);
  else
    run(linear_tile<T, Sum::kInteger, kAligned>);
}

bool aligned(const int8_t* p, int64_t ld) {
  return reinterpret_cast<uintptr_t>(p) % kChunk == 0 && ld % kChunk == 0;
}

}  // namespace

void linear_int8_sm80(const LinearInt8Args& given, Stream stream) {
  if (given.rows == 0 || given.columns == 0) return;
  LinearInt8Args args = given;
  args.piece = args.group ? args.group : kLinearInt8Exact;
  args.pieces = (args.depth + args.piece - 1) / args.piece;
  constexpr int64_t kFewTiles = 96;  // fewer leave most of an A100 idle
  const int64_t large =
      ((args.rows + Large::kM - 1) / Large::kM) * ((args.columns + Large::kN - 1) / Large::kN);
  if (!aligned(args.x, args.ldx) || !aligned(args.w, args.ldw))
    launch_tile<Medium, false>(args, stream);
  else if (args.rows <= Small::kM)
    launch_tile<Small, true>(args, stream);
  else if (large < kFewTiles)
    launch_tile<Medium, true>(args, stream);
  else
    launch_tile<Large, true>(args, stream);
}

}  // namespace narrowcast
