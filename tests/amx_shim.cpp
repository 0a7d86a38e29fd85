// C doors to the AMX kernel and to single tile instructions, both on the emulation.
#include "common/tile_amx.h"
#include "linear_int8/linear_int8.h"

using namespace narrowcast;

extern "C" int64_t panel_bytes(int64_t depth) { return linear_int8_amx.panel_bytes(depth); }

// y float32 [rows, columns]; x has rows of a multiple of 64 bytes; panel: room for one panel.
extern "C" void linear_int8_by_tiles(const int8_t* x, int64_t ldx, const int8_t* w,
                                     const float* x_scale, const float* w_scale,
                                     const int32_t* x_zero_point, const float* bias, int64_t rows,
                                     int64_t columns, int64_t depth, int64_t group, uint8_t* panel,
                                     float* y) {
  LinearInt8Args a;
  a.x = x, a.ldx = ldx, a.x_scale = x_scale, a.w_scale = w_scale, a.x_zero_point = x_zero_point;
  a.rows = rows, a.columns = columns, a.depth = depth, a.group = group;
  a.piece = group ? group : kLinearInt8Exact;
  a.pieces = group ? depth / group : (depth + kLinearInt8Exact - 1) / kLinearInt8Exact;
  a.x_scale_stride = group ? depth / group : 1, a.w_scale_stride = 1;
  a.epilogue.bias = bias, a.epilogue.out = y, a.epilogue.ld_out = columns;
  for (int64_t n = 0; n < columns; n += kLinearInt8Panel) {
    const int width =
        static_cast<int>(columns - n < kLinearInt8Panel ? columns - n : kLinearInt8Panel);
    linear_int8_amx.pack(w + n * depth, depth, width, depth, panel);
    linear_int8_amx.block(a, panel, 0, rows, n, width);
  }
}

// c [rows, columns] += a [rows, 4 * inner bytes] * b [inner, columns words], by one instruction.
extern "C" void one_dot(int kind, int rows, int inner, int columns, const void* a, const void* b,
                        void* c) {
  TileConfig config;
  config.rows[0] = config.rows[1] = static_cast<uint8_t>(rows);
  config.rows[2] = static_cast<uint8_t>(inner);
  config.bytes[0] = config.bytes[2] = static_cast<uint16_t>(columns * 4);
  config.bytes[1] = static_cast<uint16_t>(inner * 4);
  tile_config(config);
  TILE_LOAD(0, c, columns * 4);
  TILE_LOAD(1, a, inner * 4);
  TILE_LOAD(2, b, columns * 4);
  if (kind == 0) TILE_DOT_S8S8(0, 1, 2);
  if (kind == 1) TILE_DOT_U8S8(0, 1, 2);
  if (kind == 2) TILE_DOT_BF16(0, 1, 2);
  TILE_STORE(0, c, columns * 4);
  tile_release();
}
