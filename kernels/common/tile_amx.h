// The AMX tile instructions (Intel SDM, volume 2), and, when NARROWCAST_EMULATE_AMX is defined, a
// plain C++ emulation of them with the same names, so that the kernels can be compiled and checked
// anywhere.
//
// A tile number must be a literal 0..7. TDPBF16PS takes subnormals as zero and adds the even and
// the odd products of a row apart before it adds them to the accumulator.
#pragma once
#include <cstdint>

namespace narrowcast {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of tile i
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace narrowcast

#ifndef NARROWCAST_EMULATE_AMX
#include <immintrin.h>

namespace narrowcast {
// NOTE: by asm, since GCC 12's _tile_loadconfig may drop the stores that fill the structure.
static inline void tile_config(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}
static inline void tile_release() { _tile_release(); }
}  // namespace narrowcast
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, stride)
#define TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define TILE_DOT_S8S8(c, a, b) _tile_dpbssd(c, a, b)
#define TILE_DOT_U8S8(c, a, b) _tile_dpbusd(c, a, b)
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)

#else
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace narrowcast {

// What the hardware reports as #GP or #UD ends the process with the reason.
static inline void tile_fault(bool bad, const char* reason) {
  if (!bad) return;
  std::fprintf(stderr, "AMX fault: %s\n", reason);
  std::abort();
}

struct TileState {
  bool configured = false;
  TileConfig config;
  uint8_t data[8][16][64] = {};
};
static thread_local TileState t_tiles;

static inline void tile_config(const TileConfig& c) {
  tile_fault(c.palette != 1 || c.start_row != 0, "ldtilecfg: palette or start row");
  for (uint8_t byte : c.reserved) tile_fault(byte != 0, "ldtilecfg: reserved bytes");
  for (int i = 0; i < 16; ++i) {
    tile_fault(i >= 8 && (c.bytes[i] || c.rows[i]), "ldtilecfg: more than eight tiles");
    tile_fault(c.bytes[i] > 64 || c.rows[i] > 16, "ldtilecfg: tile too large");
    tile_fault((c.bytes[i] == 0) != (c.rows[i] == 0), "ldtilecfg: tile without rows or columns");
  }
  t_tiles = TileState{};
  t_tiles.configured = true;
  t_tiles.config = c;
}
static inline void tile_release() { t_tiles = TileState{}; }

static inline int tile_rows(int tile) {
  tile_fault(!t_tiles.configured || t_tiles.config.rows[tile] == 0, "tile not configured");
  return t_tiles.config.rows[tile];
}
static inline int tile_bytes(int tile) { return t_tiles.config.bytes[tile]; }

static inline void tile_zero(int tile) {
  tile_rows(tile);
  std::memset(t_tiles.data[tile], 0, sizeof t_tiles.data[tile]);
}
static inline void tile_load(int tile, const void* base, int64_t stride) {
  const int rows = tile_rows(tile);
  std::memset(t_tiles.data[tile], 0, sizeof t_tiles.data[tile]);
  for (int r = 0; r < rows; ++r)
    std::memcpy(t_tiles.data[tile][r], static_cast<const char*>(base) + r * stride,
                tile_bytes(tile));
}
static inline void tile_store(int tile, void* base, int64_t stride) {
  const int rows = tile_rows(tile);
  for (int r = 0; r < rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, t_tiles.data[tile][r], tile_bytes(tile));
}

static inline void tile_check_dot(int c, int a, int b) {
  tile_fault(c == a || c == b || a == b, "dot product: tiles must differ");
  tile_fault(tile_rows(c) != tile_rows(a) || tile_bytes(c) != tile_bytes(b) ||
                 tile_bytes(a) != 4 * tile_rows(b) || tile_bytes(b) % 4,
             "dot product: shapes do not match");
}

template <class A>
static inline void tile_dot_bytes(int c, int a, int b) {
  tile_check_dot(c, a, b);
  for (int m = 0; m < tile_rows(c); ++m)
    for (int n = 0; n < tile_bytes(c) / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, &t_tiles.data[c][m][n * 4], 4);
      for (int k = 0; k < tile_rows(b); ++k)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<uint32_t>(static_cast<A>(t_tiles.data[a][m][k * 4 + i]) *
                                       static_cast<int8_t>(t_tiles.data[b][k][n * 4 + i]));
      std::memcpy(&t_tiles.data[c][m][n * 4], &sum, 4);
    }
  for (int m = tile_rows(c); m < 16; ++m) std::memset(t_tiles.data[c][m], 0, 64);
}

static inline float tile_flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

static inline void tile_dot_bf16(int c, int a, int b) {
  tile_check_dot(c, a, b);
  const auto at = [](int tile, int row, int i) {
    uint16_t half;
    std::memcpy(&half, &t_tiles.data[tile][row][i * 2], 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return tile_flush(x);
  };
  for (int m = 0; m < tile_rows(c); ++m)
    for (int n = 0; n < tile_bytes(c) / 4; ++n) {
      float sums[2] = {0.0f, 0.0f}, acc;
      for (int k = 0; k < tile_rows(b); ++k)
        for (int i = 0; i < 2; ++i)
          sums[i] = tile_flush(std::fma(at(a, m, k * 2 + i), at(b, k, n * 2 + i), sums[i]));
      std::memcpy(&acc, &t_tiles.data[c][m][n * 4], 4);
      acc = tile_flush(tile_flush(acc) + tile_flush(sums[0] + sums[1]));
      std::memcpy(&t_tiles.data[c][m][n * 4], &acc, 4);
    }
  for (int m = tile_rows(c); m < 16; ++m) std::memset(t_tiles.data[c][m], 0, 64);
}

}  // namespace narrowcast
#define TILE_ZERO(tile) ::narrowcast::tile_zero(tile)
#define TILE_LOAD(tile, base, stride) ::narrowcast::tile_load(tile, base, stride)
#define TILE_STORE(tile, base, stride) ::narrowcast::tile_store(tile, base, stride)
#define TILE_DOT_S8S8(c, a, b) ::narrowcast::tile_dot_bytes<int8_t>(c, a, b)
#define TILE_DOT_U8S8(c, a, b) ::narrowcast::tile_dot_bytes<uint8_t>(c, a, b)
#define TILE_DOT_BF16(c, a, b) ::narrowcast::tile_dot_bf16(c, a, b)
#endif
