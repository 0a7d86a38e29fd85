// Selection, scratch and the parallel loops: raw pointers in, no torch.
#include <cstring>

#include "common/registry.h"
#include "common/scratch.h"
#include "common/tiles.h"
#include "linear/linear.h"

namespace narrowcast {
namespace {

constexpr Variant<const LinearKernel*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &linear_##name},
#include "linear/linear.inc"
#undef KERNEL
};
NC_VARIANT_LIST(linear, const LinearKernel*, kVariants)

static_assert(kRowBlock <= kLinearBlock);
constexpr int64_t kProductCost = 4;  // of one float32 product, in int8 products

int64_t bytes_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }
int64_t panel_bytes(const LinearFormat& f, int64_t depth) {
  return round_up(depth, f.depth_step) * kLinearPanel * f.element_bytes;
}

// Rows of x as the format wants them: widened, or copied with zeros after the last column.
void widen(const LinearArgs& a, const LinearFormat& format, void* to, int64_t ld) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / 64 / std::max<int64_t>(a.depth, 1));
  parallel_for(0, a.rows, grain, [&](int64_t m0, int64_t m1) {
    for (int64_t m = m0; m < m1; ++m)
      if (format.x_dtype == a.dtype) {
        const int64_t bytes = bytes_of(a.dtype);
        char* row = static_cast<char*>(to) + m * ld * bytes;
        std::memcpy(row, static_cast<const char*>(a.x) + m * a.ldx * bytes, a.depth * bytes);
        std::memset(row + a.depth * bytes, 0, (ld - a.depth) * bytes);
      } else {
        float* row = static_cast<float*>(to) + m * ld;
        for (int64_t k = 0; k < a.depth; ++k) row[k] = load_float(a.x, m * a.ldx + k, a.dtype);
      }
  });
}

}  // namespace

const LinearKernel& linear_kernel() { return *select_linear(); }

const LinearFormat& linear_format(const LinearKernel& kernel, DType dtype) {
  return dtype == DType::kFloat32   ? *kernel.float32
         : dtype == DType::kFloat16 ? *kernel.float16
                                    : *kernel.bfloat16;
}

int64_t linear_scratch(int64_t rows, int64_t depth) { return rows * round_up(depth, 16) * 4; }

int64_t linear_packed_bytes(const LinearFormat& format, int64_t columns, int64_t depth) {
  return (columns + kLinearPanel - 1) / kLinearPanel * panel_bytes(format, depth);
}

void linear_pack(const LinearFormat& format, const void* w, DType dtype, int64_t ldw,
                 int64_t columns, int64_t depth, void* packed) {
  const int64_t panels = (columns + kLinearPanel - 1) / kLinearPanel,
                bytes = panel_bytes(format, depth);
  parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n0 = p * kLinearPanel;
      format.pack(static_cast<const char*>(w) + n0 * ldw * bytes_of(dtype), ldw,
                  static_cast<int>(std::min(kLinearPanel, columns - n0)), depth,
                  static_cast<char*>(packed) + p * bytes);
    }
  });
}

void linear_run(LinearArgs a) {
  if (a.rows == 0 || a.columns == 0) return;
  if (!a.kernel) a.kernel = select_linear();
  const LinearFormat& format = linear_format(*a.kernel, a.dtype);
  if (format.x_dtype != a.dtype || a.depth % format.depth_step) {
    const int64_t ld = round_up(a.depth, format.depth_step);
    widen(a, format, a.scratch, ld);
    a.x = a.scratch, a.ldx = ld;
  }
  const int64_t bytes = panel_bytes(format, a.depth);
  if (a.packed)
    return parallel_tiles(a.rows, a.columns, kLinearPanel, a.depth * kProductCost,
                          [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
                            format.block(
                                a, static_cast<const char*>(a.packed) + n0 / kLinearPanel * bytes,
                                m0, m1, n0, static_cast<int>(n1 - n0));
                          });
  const int64_t column_cost = std::max<int64_t>(1, (a.rows + 4) * a.depth * kProductCost);
  if (format.direct && a.rows <= kLinearDirectRows)
    return parallel_for(0, (a.columns + 15) / 16,
                        std::max<int64_t>(1, kWorthAThread / 16 / column_cost),
                        [&](int64_t begin, int64_t end) {
                          format.direct(a, begin * 16, std::min(a.columns, end * 16));
                        });
  parallel_for(0, (a.columns + kLinearPanel - 1) / kLinearPanel,
               std::max<int64_t>(1, kWorthAThread / kLinearPanel / column_cost),
               [&](int64_t begin, int64_t end) {
                 const ThreadScratch panel(bytes);
                 for (int64_t p = begin; p < end; ++p) {
                   const int64_t n0 = p * kLinearPanel;
                   const int columns = static_cast<int>(std::min(kLinearPanel, a.columns - n0));
                   format.pack(static_cast<const char*>(a.w) + n0 * a.ldw * bytes_of(a.dtype),
                               a.ldw, columns, a.depth, panel.data());
                   for (int64_t m0 = 0; m0 < a.rows; m0 += kRowBlock)
                     format.block(a, panel.data(), m0, std::min(a.rows, m0 + kRowBlock), n0,
                                  columns);
                 }
               });
}

}  // namespace narrowcast
