// Which tile of a matrix a block computes. Blocks that run together lie in a band of kBand tiles of
// rows, where they share the columns' operand in L2.
#pragma once
#include "common/ptx.cuh"

namespace narrowcast {

constexpr int kBand = 8;

struct TileOrigin {
  int64_t row, column;
};

__device__ __forceinline__ TileOrigin tile_origin(int64_t block, int64_t rows, int64_t columns,
                                                  int tile_rows, int tile_columns) {
  const int64_t tiles_m = (rows + tile_rows - 1) / tile_rows;
  const int64_t tiles_n = (columns + tile_columns - 1) / tile_columns;
  const int64_t first = block / (kBand * tiles_n) * kBand;
  const int64_t high = tiles_m - first < kBand ? tiles_m - first : kBand;
  const int64_t within = block - first * tiles_n;
  return {(first + within % high) * tile_rows, within / high * tile_columns};
}

}  // namespace narrowcast
