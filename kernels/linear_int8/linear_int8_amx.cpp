// linear_int8 with AMX tiles: signed by signed bytes, 16 x 16 sums of 64 products per instruction.
// Verified by the emulation in common/tile_amx.h only; it has not run on hardware.
//
// Panel: [K / 4][64][4] bytes, K padded to 64 by zeros, then the sums of its 64 rows as int32.
// Blocking: 32 rows x 32 columns = accumulators 0..3 (rows / 16, columns / 16), x in 4 and 5,
// weights in 6 and 7, so that every load feeds two products. Groups that are no multiple of 64 run
// in steps of 32.
#include "common/tile_amx.h"
#include "linear_int8/linear_int8_panel_avx512.h"

namespace narrowcast {
namespace {

constexpr int kRows = 32;

// upper, lower: rows of the two tiles of x; depth: bytes of their rows.
void configure(int upper, int lower, int depth) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool weights = tile >= 6;
    const int rows = weights ? depth / 4 : tile == 0 || tile == 1 || tile == 4 ? upper : lower;
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.bytes[tile] = static_cast<uint16_t>(rows == 0 ? 0 : tile == 4 || tile == 5 ? depth : 64);
  }
  tile_config(config);
}

// sums[r][0..31] of all rows = products over [k, end) with 32 columns of the panel.
template <bool kLower>
void multiply(const int8_t* x, int64_t ldx, const uint8_t* w, int64_t k, int64_t end, int64_t step,
              int32_t* sums) {
  constexpr int64_t kSumBytes = kLinearInt8Panel * 4;
  TILE_ZERO(0);
  TILE_ZERO(1);
  if constexpr (kLower) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (; k < end; k += step) {
    const uint8_t* weights = w + k / 4 * kStep;
    TILE_LOAD(6, weights, kStep);
    TILE_LOAD(4, x + k, ldx);
    TILE_DOT_S8S8(0, 4, 6);
    TILE_LOAD(7, weights + 64, kStep);
    TILE_DOT_S8S8(1, 4, 7);
    if constexpr (kLower) {
      TILE_LOAD(5, x + 16 * ldx + k, ldx);
      TILE_DOT_S8S8(2, 5, 6);
      TILE_DOT_S8S8(3, 5, 7);
    }
  }
  TILE_STORE(0, sums, kSumBytes);
  TILE_STORE(1, sums + 16, kSumBytes);
  if constexpr (kLower) {
    TILE_STORE(2, sums + 16 * kLinearInt8Panel, kSumBytes);
    TILE_STORE(3, sums + 16 * kLinearInt8Panel + 16, kSumBytes);
  }
}

void block(const LinearInt8Args& a, const uint8_t* panel, int64_t m0, int64_t m1, int64_t n0,
           int columns) {
  const int64_t padded = padded_to<64>(a.depth), step = a.piece % 64 ? 32 : 64;
  const int32_t* w_sum = reinterpret_cast<const int32_t*>(panel + padded * kLinearInt8Panel);
  const bool pieces = a.pieces != 1 || a.group;
  alignas(64) int32_t sums[kRows * kLinearInt8Panel];
  alignas(64) float total[kRows * kLinearInt8Panel];
  int64_t configured = 0;
  for (int64_t m = m0; m < m1; m += kRows) {
    const int rows = m1 - m < kRows ? static_cast<int>(m1 - m) : kRows;
    const int upper = rows < 16 ? rows : 16, lower = rows - upper;
    if (configured != rows) configure(upper, lower, static_cast<int>(step));
    configured = rows;
    const int8_t* x = a.x + m * a.ldx;
    if (pieces)
      for (int i = 0; i < rows * kLinearInt8Panel; ++i) total[i] = 0.0f;
    for (int64_t p = 0; p < a.pieces; ++p) {
      const int64_t begin = p * a.piece;
      const int64_t end = padded - begin < a.piece ? padded : begin + a.piece;
      for (int n = 0; n < columns; n += 32) {
        if (lower)
          multiply<true>(x, a.ldx, panel + n * 4, begin, end, step, sums + n);
        else
          multiply<false>(x, a.ldx, panel + n * 4, begin, end, step, sums + n);
      }
      if (!pieces) continue;
      for (int r = 0; r < rows; ++r) {
        const __m512 scale =
            _mm512_set1_ps(a.group ? a.x_scale[(m + r) * a.x_scale_stride + p] : 1.0f);
        for (int i = r * kLinearInt8Panel; i < r * kLinearInt8Panel + columns; i += 16)
          _mm512_store_ps(total + i,
                          _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + i)), scale,
                                          _mm512_load_ps(total + i)));
      }
    }
    void* result = pieces ? static_cast<void*>(total) : sums;
    finish_tile(a, static_cast<__m512i*>(result), pieces, m, rows, n0, columns, w_sum);
  }
  tile_release();
}

}  // namespace

extern const LinearInt8Kernel linear_int8_amx = {
    "tiles64", 64, panel_bytes<64>, pack<64, false>, block, row_starts, direct, 4};

}  // namespace narrowcast
