// linear_grouped on sm_80 and later: int4 or int8 weights, float16 tensor cores (mma m16n8k16).
//
//   y[m, n] = epilogue(sum_g scale[n, g] * P + (offset[n, g] + c * scale[n, g]) * S)
//   P = sum_{k in g} x (q - c),  S = sum_{k in g} x,  c = 8 (bits 4) or 0 (bits 8)
//
// Codes less c are exact in 16 bits, so the products of a group are those of the numbers given; the
// scale meets the group's sum in float32, not the weight. S is one more column of ones, and only
// counts where there is an offset.
//
// Work: a block computes a tile kM x kN of y, its warps a grid of warp tiles. K goes by in steps of
// 64 through a ring of kStages buffers, copied asynchronously, with one barrier a step (see
// linear_int8_sm80.cu). The order of k inside 32 is free as long as x and w agree: a lane reads 8
// successive codes and the 8 values of x that belong to them, so that no fragment needs ldmatrix.
// Few rows and much K: K is cut into pieces of fixed size whose sums are added in order by a second
// kernel. Up to 4 rows, and float32 x: linear_grouped_rows, which needs no tensor core.
//
// Numerics: float32 sums, of a group first; --fmad=false. Where x is not finite, neither is y.
// Cost: 2 M N K operations; bytes 2 M K + N K bits / 8 per pass over the tiles.
//
// GATE linear_grouped_tile: spills = 0, contains HMMA.16816.F32 LDGSTS.E.BYPASS.128 LDS.128
// GATE linear_grouped_tile.*Li128E: registers <= 255
// GATE linear_grouped_tile.*TileILi64E: registers <= 216
// GATE linear_grouped_tile.*TileILi16E: registers <= 128
// GATE linear_grouped_rows: registers <= 168, spills = 0, contains LDG.E.128
// GATE linear_grouped_sum: registers <= 40, spills = 0
// GATE block: shared <= 99000
#include "common/epilogue.cuh"
#include "common/raster.cuh"
#include "common/vector8.cuh"
#include "linear_grouped/linear_grouped_cuda.h"

namespace narrowcast {
namespace {

constexpr int kStep = 64;   // values of K in a buffer
constexpr int kHalf = 32;   // that are multiplied at once; a group is a number of these
constexpr int kChunk = 16;  // bytes of one copy

template <int kRows_, int kColumns_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Tile {
  static constexpr int kM = kRows_, kN = kColumns_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kThreads = kWarpsM_ * kWarpsN_ * ptx::kWarp;
  static constexpr int kWarpM = kM / kWarpsM_, kWarpN = kN / kWarpsN_;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
};
using Large = Tile<128, 128, 2, 4, 3>;
using Medium = Tile<64, 64, 2, 2, 4>;
using Small = Tile<16, 64, 1, 4, 8>;  // few tokens: the bytes of w decide

template <class T, int kBits>
union Shared {
  struct {
    alignas(128) uint16_t x[T::kStages][T::kM][kStep];
    alignas(128) uint8_t w[T::kStages][T::kN][kStep * kBits / 8];
  } ring;
  alignas(128) float y[T::kM][T::kN + 4];  // + 4: neighbouring rows in other banks
};

// Where chunk `chunk` of row `row` lies in its row, so that what eight lanes (x), a warp (4 bits)
// or half a one (8 bits) read at once falls into different banks.
__device__ __forceinline__ int place_x(int row, int chunk) { return chunk ^ (row & 1) << 2; }
template <int kBits>
__device__ __forceinline__ int place_w(int row, int chunk) {
  return kBits == 4 ? chunk ^ (row >> 2 & 1) : chunk ^ (row >> 1 & 1) << 1;
}

// The part of K that a block sums, and where its sums go when it is not all of K.
struct Piece {
  int64_t size;  // a whole number of groups and of steps
  float* partials;
};

// 16 bytes each of rows row0 .. of a matrix, from byte `from` of each row on. What lies past the
// rows or past `end` is zero. kRow: the bytes of a row in `to`; place: (row, chunk) -> chunk.
template <int kRows, int kThreads, int kRow, class Place>
__device__ __forceinline__ void copy_rows(void* to, const void* matrix, int64_t row_bytes,
                                          int64_t rows, int64_t row0, int64_t from, int64_t end,
                                          Place place) {
  constexpr int kChunks = kRow / kChunk;
  const int chunk = threadIdx.x % kChunks;
  const int64_t byte = from + chunk * kChunk;
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < kRows; row += kThreads / kChunks) {
    const bool exists = row0 + row < rows && byte < end;
    const char* source = static_cast<const char*>(matrix);
    ptx::cp_async_16(static_cast<char*>(to) + row * kRow + place(row, chunk) * kChunk,
                     exists ? source + (row0 + row) * row_bytes + byte : source,
                     exists ? kChunk : 0);
  }
}

// Two codes less their centre as 16-bit floats, for both mma steps of 32 k: b[step] as the mma
// takes it. 4 bits: codes 0 4, 1 5, 2 6, 3 7 of the word pair up, for they lie 16 bits apart.
template <DType kType, int kBits>
__device__ __forceinline__ void decode(const void* row, uint32_t (&b)[2][2]) {
  constexpr bool kFloat16 = kType == DType::kFloat16;
  if constexpr (kBits == 4) {
    // An exponent in front of a code makes it 1024 + code in float16, 128 + code in bfloat16.
    constexpr uint32_t kFront = kFloat16 ? 0x64006400u : 0x43004300u;
    constexpr uint32_t kOne = kFloat16 ? 0x3c003c00u : 0x3f803f80u;
    constexpr uint32_t kBack = kFloat16 ? 0xe408e408u : 0xc308c308u;  // -1032, -136
    const uint32_t word = *static_cast<const uint32_t*>(row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t raised = (word >> 4 * i & 0x000f000fu) | kFront;
      b[i / 2][i % 2] =
          kFloat16 ? ptx::fma_f16x2(raised, kOne, kBack) : ptx::fma_bf16x2(raised, kOne, kBack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = static_cast<const uint32_t*>(row)[i] ^ 0x80808080u;  // code + 128
      if constexpr (kFloat16) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          b[i][e] = ptx::fma_f16x2(ptx::permute_bytes(word, 0x64646464u, e ? 0x4342 : 0x4140),
                                   0x3c003c00u, 0xe480e480u);  // less 1152
      } else {
        // bfloat16 has no room behind such an exponent: by way of float32, 2^23 + code + 128.
        uint32_t wide[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          wide[e] = ptx::bits_of_float(
              ptx::float_of_bits(ptx::permute_bytes(word, 0x4b000000u, 0x7550 + e)) - 8388736.0f);
#pragma unroll
        for (int e = 0; e < 2; ++e)
          b[i][e] = ptx::permute_bytes(wide[2 * e], wide[2 * e + 1], 0x7632);
      }
    }
  }
}

// The values of x that belong to those codes, of one row: a[step][0 and 1], by halves of k.
template <int kBits>
__device__ __forceinline__ void order_x(const ptx::Words4& eight, uint32_t (&a)[2][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i / 2][i % 2] = kBits == 4 ? ptx::permute_bytes(eight.word[i / 2], eight.word[i / 2 + 2],
                                                      i % 2 ? 0x7632 : 0x5410)
                                 : eight.word[i];
}

template <DType kType>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (kType == DType::kFloat16)
    ptx::mma_f16(d, a, b);
  else
    ptx::mma_bf16(d, a, b);
}

__device__ __forceinline__ float load_scale(const GroupedLayout& layout, const void* scales,
                                            int64_t n, int64_t group) {
  const int64_t at = n * (layout.k / layout.group) + group;
  return load_float_device(scales, at, layout.half ? DType::kFloat16 : DType::kFloat32);
}

// The registers of one warp.
template <class T>
struct Accumulators {
  float product[T::kMmaM][T::kMmaN][4] = {};  // of this group
  float x_sum[T::kMmaM][4] = {};              // the same in all columns
  float sum[T::kMmaM][T::kMmaN][4] = {};
  float scale[T::kMmaN][2], offset[T::kMmaN][2];  // of this group; offset of codes less c

  // Asked for when a group begins: they are there when it ends.
  __device__ __forceinline__ void load_scales(const LinearGroupedArgs& args, int64_t n0,
                                              int64_t group, int lane) {
    const float centre = args.layout.bits == 4 ? 8.0f : 0.0f;
    const bool exists = group < args.layout.k / args.layout.group;
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t n = n0 + j * 8 + lane % 4 * 2 + e;
        const bool inside = exists && n < args.layout.n;
        scale[j][e] = inside ? load_scale(args.layout, args.source.scale, n, group) : 0.0f;
        offset[j][e] = 0.0f;
        if (inside && args.source.offset)
          offset[j][e] =
              load_scale(args.layout, args.source.offset, n, group) + centre * scale[j][e];
      }
  }
  __device__ __forceinline__ void end_group(bool has_offset) {
#pragma unroll
    for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int j = 0; j < T::kMmaN; ++j) {
          float v = product[i][j][r] * scale[j][r % 2];
          if (has_offset) v = v + x_sum[i][r] * offset[j][r % 2];
          sum[i][j][r] = sum[i][j][r] + v;
          product[i][j][r] = 0.0f;
        }
        x_sum[i][r] = 0.0f;
      }
  }
};

// 32 of K for the warp tile; half: which of the two in the buffer.
template <class T, DType kType, int kBits>
__device__ __forceinline__ void multiply(Accumulators<T>& acc, const uint16_t (&x)[T::kM][kStep],
                                         const uint8_t (&w)[T::kN][kStep * kBits / 8], int half,
                                         int warp_m, int warp_n, int lane, bool has_offset) {
  constexpr uint32_t kOnes = kType == DType::kFloat16 ? 0x3c003c00u : 0x3f803f80u;
  const int group = lane / 4, quad = lane % 4;
  uint32_t a[T::kMmaM][2][4];
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int row = warp_m + i * 16 + below * 8 + group;
      const uint16_t* at = x[row] + place_x(row, half * 4 + quad) * (kChunk / 2);
      uint32_t ordered[2][2];
      order_x<kBits>(ptx::load_shared_128(at), ordered);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int e = 0; e < 2; ++e) a[i][step][e * 2 + below] = ordered[step][e];
    }
  const uint32_t ones[2] = {kOnes, kOnes};
#pragma unroll
  for (int j = 0; j < T::kMmaN; ++j) {
    const int row = warp_n + j * 8 + group;
    constexpr int kBytes = kBits;  // of 8 codes
    const int byte = quad * kBytes, chunk = half * (kHalf * kBits / 8 / kChunk) + byte / kChunk;
    uint32_t b[2][2];
    decode<kType, kBits>(w[row] + place_w<kBits>(row, chunk) * kChunk + byte % kChunk, b);
#pragma unroll
    for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
      for (int step = 0; step < 2; ++step)
        multiply_add<kType>(acc.product[i][j], a[i][step], b[step]);
  }
  if (has_offset) {
#pragma unroll
    for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
      for (int step = 0; step < 2; ++step) multiply_add<kType>(acc.x_sum[i], a[i][step], ones);
  }
}

template <class T, DType kType, int kBits>
__global__ void __launch_bounds__(T::kThreads, T::kM == 128 ? 1 : 2)
    linear_grouped_tile(LinearGroupedArgs args, Piece piece) {
  // setup
  Shared<T, kBits>& shared = ptx::shared_memory<Shared<T, kBits>>();
  const GroupedLayout& l = args.layout;
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int warp_m = warp / T::kWarpsN * T::kWarpM, warp_n = warp % T::kWarpsN * T::kWarpN;
  const TileOrigin origin = tile_origin(blockIdx.x, args.m, l.n, T::kM, T::kN);
  const int64_t m0 = origin.row, n0 = origin.column, k0 = blockIdx.y * piece.size;
  const int64_t k1 = l.k - k0 < piece.size ? l.k : k0 + piece.size;
  const int64_t steps = (k1 - k0 + kStep - 1) / kStep;
  const auto load = [&](int64_t step) {
    const int stage = static_cast<int>(step % T::kStages);
    const int64_t k = k0 + step * kStep;
    copy_rows<T::kM, T::kThreads, kStep * 2>(shared.ring.x[stage], args.x, l.k * 2, args.m, m0,
                                             k * 2, k1 * 2, place_x);
    copy_rows<T::kN, T::kThreads, kStep * kBits / 8>(shared.ring.w[stage], args.source.codes,
                                                     l.k * kBits / 8, l.n, n0, k * kBits / 8,
                                                     k1 * kBits / 8, place_w<kBits>);
  };
  const bool has_offset = args.source.offset != nullptr;
  Accumulators<T> acc;
  int64_t group = k0 / l.group, left = l.group;
  acc.load_scales(args, n0 + warp_n, group, lane);

  // load and compute: one group of copies per step, even where no copy is left
  for (int64_t step = 0; step < T::kStages - 1; ++step) {
    if (step < steps) load(step);
    ptx::cp_async_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<T::kStages - 2>();
    ptx::sync_threads();
    if (step + T::kStages - 1 < steps) load(step + T::kStages - 1);
    ptx::cp_async_commit();
    const int stage = static_cast<int>(step % T::kStages);
#pragma unroll
    for (int half = 0; half < kStep / kHalf; ++half) {
      multiply<T, kType, kBits>(acc, shared.ring.x[stage], shared.ring.w[stage], half, warp_m,
                                warp_n, lane, has_offset);
      left -= kHalf;
      if (left == 0) {
        acc.end_group(has_offset);
        ++group, left = l.group;
        acc.load_scales(args, n0 + warp_n, group, lane);
      }
    }
  }

  // into shared memory
  ptx::sync_threads();  // the ring is no longer read
#pragma unroll
  for (int i = 0; i < T::kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < T::kMmaN; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = warp_m + i * 16 + r / 2 * 8 + lane / 4;
        shared.y[row][warp_n + j * 8 + lane % 4 * 2 + r % 2] = acc.sum[i][j][r];
      }
  ptx::sync_threads();

  // finish and store: neighbouring threads, neighbouring columns
  Epilogue epilogue = args.epilogue;
  if (piece.partials) {
    epilogue = Epilogue{};
    epilogue.out = piece.partials + blockIdx.y * args.m * l.n, epilogue.ld_out = l.n;
  }
  for (int i = threadIdx.x; i < T::kM * (T::kN / 4); i += T::kThreads) {
    const int row = i / (T::kN / 4), column = i % (T::kN / 4) * 4;
    const int64_t m = m0 + row, n = n0 + column, exist = l.n - n;
    if (m >= args.m || exist <= 0) continue;
    float v[4] = {shared.y[row][column], shared.y[row][column + 1], shared.y[row][column + 2],
                  shared.y[row][column + 3]};
    finish_device(epilogue, v, m, n, four_of(exist));
  }
}

constexpr int kSumThreads = 128;

// Adds the sums of the pieces of K, in order, and finishes.
__global__ void __launch_bounds__(kSumThreads)
    linear_grouped_sum(LinearGroupedArgs args, const float* partials, int pieces) {
  const int64_t columns = args.layout.n, across = (columns + 3) / 4;
  const int64_t i = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  const int64_t m = i / across, n = i % across * 4, exist = columns - n;
  if (m >= args.m) return;
  float v[4] = {};
  for (int p = 0; p < pieces; ++p)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < exist) v[e] = v[e] + partials[(p * args.m + m) * columns + n + e];
  finish_device(args.epilogue, v, m, n, four_of(exist));
}

// Few rows. A block computes kRowColumns columns; its warps share K, 16 bytes of codes of each
// column a lane and step, straight from memory.
constexpr int kRowWarps = 4, kRowColumns = 4;

struct RowsShared {
  float sum[kRowWarps][4][kRowColumns];  // of a warp, by row and column
};

// A code behind the exponent of 1 is 1 + code / 16 or 1 + (code + 128) / 256 in float32: one shift
// and one and-or, no subtraction; what it adds to the sum is taken off with S.
template <int kBits>
__device__ __forceinline__ float raised(uint32_t word, int i) {
  constexpr uint32_t kMask = kBits == 4 ? 0x00780000u : 0x007f8000u;
  const int shift = (kBits == 4 ? 19 : 15) - i * kBits;
  const uint32_t bits = shift >= 0 ? word << shift : word >> -shift;
  return ptx::float_of_bits((bits & kMask) | 0x3f800000u);
}

template <DType kType, int kBits, int kRows>
__global__ void __launch_bounds__(kRowWarps* ptx::kWarp, kRows == 1 ? 6 : 3)
    linear_grouped_rows(LinearGroupedArgs args) {
  // setup
  RowsShared& shared = ptx::shared_memory<RowsShared>();
  const GroupedLayout& l = args.layout;
  constexpr int kCodes = 128 / kBits;  // of a lane and column in one step
  constexpr float kUnit = kBits == 4 ? 16.0f : 256.0f, kLift = kBits == 4 ? 24.0f : 384.0f;
  constexpr float kCentre = kBits == 4 ? 8.0f : 0.0f;
  constexpr uint32_t kFlip = kBits == 4 ? 0 : 0x80808080u;
  const int lane = threadIdx.x % ptx::kWarp, warp = threadIdx.x / ptx::kWarp;
  const int64_t across = (l.n + kRowColumns - 1) / kRowColumns;
  const int64_t n0 = blockIdx.x % across * kRowColumns, m0 = blockIdx.x / across * kRows;
  const auto inside = [](int64_t i, int64_t count) { return i < count ? i : count - 1; };
  float sum[kRows][kRowColumns] = {};

  for (int64_t k = threadIdx.x * kCodes; k < l.k; k += kRowWarps * ptx::kWarp * kCodes) {
    uint32_t codes[kRowColumns][4];
#pragma unroll
    for (int c = 0; c < kRowColumns; ++c) {
      const uint8_t* row = args.source.codes + inside(n0 + c, l.n) * (l.k * kBits / 8);
      const ptx::Words4 words = ptx::load_global_128(row + k * kBits / 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[c][i] = words.word[i] ^ kFlip;
    }
    float lifted[kRows][kRowColumns] = {}, x_sum[kRows] = {};
#pragma unroll
    for (int vector = 0; vector < kCodes / kVector; ++vector)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float x[kVector];
        const int64_t at = inside(m0 + r, args.m) * l.k + k + vector * kVector;
        load_vector<kType, true>(args.x, at, kVector, x);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          constexpr int kInWord = 32 / kBits;
          const int word = vector * (kVector / kInWord) + e / kInWord;
          x_sum[r] = x_sum[r] + x[e];
#pragma unroll
          for (int c = 0; c < kRowColumns; ++c)
            lifted[r][c] = lifted[r][c] + x[e] * raised<kBits>(codes[c][word], e % kInWord);
        }
      }
    const int64_t group = k / l.group;
#pragma unroll
    for (int c = 0; c < kRowColumns; ++c) {
      const int64_t n = inside(n0 + c, l.n);
      const float scale = load_scale(l, args.source.scale, n, group);
      const bool has_offset = args.source.offset != nullptr;
      const float offset =
          has_offset ? load_scale(l, args.source.offset, n, group) + kCentre * scale : 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float product = lifted[r][c] * kUnit - x_sum[r] * kLift;
        sum[r][c] = sum[r][c] + product * scale + (has_offset ? x_sum[r] * offset : 0.0f);
      }
    }
  }

  // the lanes, then the warps
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kRowColumns; ++c) {
      float v = sum[r][c];
#pragma unroll
      for (int mask = ptx::kWarp / 2; mask > 0; mask /= 2) v = v + ptx::shuffle_xor(v, mask);
      if (lane == 0) shared.sum[warp][r][c] = v;
    }
  ptx::sync_threads();
  const int row = threadIdx.x;
  if (row >= kRows || m0 + row >= args.m) return;
  float v[4];
#pragma unroll
  for (int c = 0; c < kRowColumns; ++c) {
    v[c] = 0.0f;
#pragma unroll
    for (int other = 0; other < kRowWarps; ++other) v[c] = v[c] + shared.sum[other][row][c];
  }
  const int64_t exist = l.n - n0;
  finish_device(args.epilogue, v, m0 + row, n0, four_of(exist));
}

int64_t tiles(const LinearGroupedArgs& a, int64_t rows, int64_t columns) {
  return (a.m + rows - 1) / rows * ((a.layout.n + columns - 1) / columns);
}

bool by_rows(const LinearGroupedArgs& a) { return a.m <= 4 || a.x_dtype == DType::kFloat32; }

// Enough blocks to fill an A100, of at least 512 values of K.
int64_t piece_size(const LinearGroupedArgs& a) {
  constexpr int64_t kBlocks = 216, kLeast = 512;
  const int64_t blocks =
      a.m <= Small::kM ? tiles(a, Small::kM, Small::kN) : tiles(a, Medium::kM, Medium::kN);
  const int64_t wanted = kBlocks / blocks, most = a.layout.k / kLeast;
  const int64_t pieces = wanted < most ? wanted : most;
  const int64_t unit = a.layout.group % kStep ? a.layout.group * 2 : a.layout.group;
  const int64_t units = (a.layout.k + unit - 1) / unit;
  return pieces <= 1 ? units * unit : (units + pieces - 1) / pieces * unit;
}

int64_t pieces_of(const LinearGroupedArgs& a) {
  const int64_t size = piece_size(a);
  return size ? (a.layout.k + size - 1) / size : 1;
}

unsigned blocks_of(int64_t blocks) {
  NC_CHECK(blocks <= 0x7fffffff, "linear_grouped",
           "x and packed must give at most 2^31 tiles, got ", blocks);
  return static_cast<unsigned>(blocks);
}

template <class T, DType kType>
void launch_tiles(const LinearGroupedArgs& args, float* partials, Stream stream) {
  const Piece piece = {piece_size(args), partials};
  const int64_t pieces = pieces_of(args);
  const auto run = [&](auto kernel, size_t shared_bytes) {
    launch("linear_grouped", kernel,
           dim3(blocks_of(tiles(args, T::kM, T::kN)), static_cast<unsigned>(pieces ? pieces : 1)),
           dim3(T::kThreads), shared_bytes, stream, args, piece);
  };
  if (args.layout.bits == 4)
    run(linear_grouped_tile<T, kType, 4>, sizeof(Shared<T, 4>));
  else
    run(linear_grouped_tile<T, kType, 8>, sizeof(Shared<T, 8>));
  if (!partials) return;
  const int64_t fours = args.m * ((args.layout.n + 3) / 4);
  launch("linear_grouped", linear_grouped_sum,
         dim3(blocks_of((fours + kSumThreads - 1) / kSumThreads)), dim3(kSumThreads), 0, stream,
         args, partials, static_cast<int>(pieces));
}

template <DType kType>
void launch_rows(const LinearGroupedArgs& args, Stream stream) {
  const auto run = [&](auto kernel, int rows) {
    launch("linear_grouped", kernel, dim3(blocks_of(tiles(args, rows, kRowColumns))),
           dim3(kRowWarps * ptx::kWarp), sizeof(RowsShared), stream, args);
  };
  const bool four = args.layout.bits == 4;
  if (args.m == 1)
    four ? run(linear_grouped_rows<kType, 4, 1>, 1) : run(linear_grouped_rows<kType, 8, 1>, 1);
  else if (args.m == 2)
    four ? run(linear_grouped_rows<kType, 4, 2>, 2) : run(linear_grouped_rows<kType, 8, 2>, 2);
  else
    four ? run(linear_grouped_rows<kType, 4, 4>, 4) : run(linear_grouped_rows<kType, 8, 4>, 4);
}

template <DType kType>
void launch_halves(const LinearGroupedArgs& args, float* partials, Stream stream) {
  constexpr int64_t kFewTiles = 96;  // fewer leave most of an A100 idle
  if (args.m <= Small::kM)
    launch_tiles<Small, kType>(args, partials, stream);
  else if (partials || tiles(args, Large::kM, Large::kN) < kFewTiles)
    launch_tiles<Medium, kType>(args, partials, stream);
  else
    launch_tiles<Large, kType>(args, partials, stream);
}

}  // namespace

int64_t linear_grouped_sm80_partials(const LinearGroupedArgs& args) {
  if (args.m == 0 || args.layout.n == 0 || by_rows(args)) return 0;
  const int64_t pieces = pieces_of(args);
  return pieces > 1 ? pieces * args.m * args.layout.n : 0;
}

void linear_grouped_sm80(const LinearGroupedArgs& args, float* partials, Stream stream) {
  if (args.m == 0 || args.layout.n == 0) return;
  const bool half = args.x_dtype == DType::kFloat16;
  if (args.x_dtype == DType::kFloat32)
    launch_rows<DType::kFloat32>(args, stream);
  else if (by_rows(args))
    half ? launch_rows<DType::kFloat16>(args, stream) : launch_rows<DType::kBFloat16>(args, stream);
  else
    half ? launch_halves<DType::kFloat16>(args, partials, stream)
         : launch_halves<DType::kBFloat16>(args, partials, stream);
}

}  // namespace narrowcast
