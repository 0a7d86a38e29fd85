// linear_grouped on sm_80 and later: int4 or int8 weights, float16 tensor cores (mma m16n8k16).
//
//   y[m, n] = epilogue(sum_g scale[n, g] * P + (offset[n, g] + c * scale[n, g]) * S)
//   P = sum_{k in g} x (q - c),  S = sum_{k in g} x,  c = 8 (bits 4) or 0 (bits 8)
//
// Codes less c are exact in 16 bits, so the products of a group are those of the numbers given; the
// scale meets the group's sum in float32, not the weight. S is one more column of ones, and only
// counts where there is an offset.
//
// Work: linear_grouped_tile.cuh; K goes by through a ring of buffers (common/mma_tiles.cuh).
// Few rows and much K: K is cut into pieces of fixed size whose sums are added in order by a second
// kernel. Up to 4 rows, and float32 x: linear_grouped_rows.cuh.
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
#include "linear_grouped/linear_grouped_rows.cuh"
#include "linear_grouped/linear_grouped_tile.cuh"

namespace narrowcast {
namespace {

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
