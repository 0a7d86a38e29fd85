// Selection, scratch and the parallel loops: raw pointers in, no torch.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/registry.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "common/tiles.h"
#include "linear_int8/linear_int8.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr Variant<const LinearInt8Kernel*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &linear_int8_##name},
#include "linear_int8/linear_int8.inc"
#undef KERNEL
};
NC_VARIANT_LIST(linear_int8, const LinearInt8Kernel*, kVariants)

constexpr int64_t kMostDepthStep = 64;  // of any kernel
struct Scratch {
  int32_t* start;
  int8_t* x;
};
Scratch split(const LinearInt8Args& a) {
  char* p = static_cast<char*>(a.scratch);
  return {reinterpret_cast<int32_t*>(p),
          reinterpret_cast<int8_t*>(p + round_up(a.rows * a.pieces * 4, 64))};
}

int64_t count_pieces(int64_t depth, int64_t group) {
  return group ? depth / group
               : std::max<int64_t>(1, (depth + kLinearInt8Exact - 1) / kLinearInt8Exact);
}

void complete(LinearInt8Args& a) {
  if (!a.kernel) a.kernel = select_linear_int8();
  a.piece = a.group ? a.group : kLinearInt8Exact;
  a.pieces = count_pieces(a.depth, a.group);
}

// The product, when x, scales and start are ready.
void multiply(const LinearInt8Args& a) {
  const LinearInt8Kernel& kernel = *a.kernel;
  const int64_t panels = (a.columns + kLinearInt8Panel - 1) / kLinearInt8Panel,
                bytes = kernel.panel_bytes(a.depth);
  const auto width = [&](int64_t n0) {
    return static_cast<int>(std::min(kLinearInt8Panel, a.columns - n0));
  };

  if (a.packed)
    return parallel_tiles(a.rows, a.columns, kLinearInt8Panel, a.depth,
                          [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
                            kernel.block(a, a.packed + n0 / kLinearInt8Panel * bytes, m0, m1, n0,
                                         static_cast<int>(n1 - n0));
                          });
  if (kernel.direct && a.rows <= kernel.direct_rows && a.pieces == 1 && !a.group &&
      !a.x_zero_point) {
    const int64_t grain =
        std::max<int64_t>(1, kWorthAThread / (16 * a.rows * std::max<int64_t>(a.depth, 1)));
    parallel_for(0, (a.columns + 15) / 16, grain, [&](int64_t begin, int64_t end) {
      kernel.direct(a, begin * 16, std::min(a.columns, end * 16));
    });
    return;
  }
  const int64_t cost = (a.rows + 4) * kLinearInt8Panel * std::max<int64_t>(a.depth, 1);
  parallel_for(0, panels, std::max<int64_t>(1, kWorthAThread / cost),
               [&](int64_t begin, int64_t end) {
                 const ThreadScratch buffer(bytes);
                 uint8_t* packed = static_cast<uint8_t*>(buffer.data());
                 for (int64_t panel = begin; panel < end; ++panel) {
                   const int64_t n0 = panel * kLinearInt8Panel;
                   kernel.pack(a.w + n0 * a.ldw, a.ldw, width(n0), a.depth, packed);
                   kernel.block(a, packed, 0, a.rows, n0, width(n0));
                 }
               });
}

}  // namespace

const LinearInt8Kernel& linear_int8_kernel() { return *select_linear_int8(); }

int64_t linear_int8_scratch(int64_t rows, int64_t depth, int64_t group) {
  return round_up(rows * count_pieces(depth, group) * 4, 64) +
         rows * round_up(depth, kMostDepthStep) + 64;
}

int64_t linear_int8_packed_bytes(const LinearInt8Kernel& kernel, int64_t columns, int64_t depth) {
  return (columns + kLinearInt8Panel - 1) / kLinearInt8Panel * kernel.panel_bytes(depth);
}

void linear_int8_pack(const LinearInt8Kernel& kernel, const int8_t* w, int64_t ldw, int64_t columns,
                      int64_t depth, uint8_t* packed) {
  const int64_t panels = (columns + kLinearInt8Panel - 1) / kLinearInt8Panel,
                bytes = kernel.panel_bytes(depth);
  parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n0 = p * kLinearInt8Panel;
      kernel.pack(w + n0 * ldw, ldw, static_cast<int>(std::min(kLinearInt8Panel, columns - n0)),
                  depth, packed + p * bytes);
    }
  });
}

void linear_int8_run(LinearInt8Args a) {
  if (a.rows == 0 || a.columns == 0) return;
  complete(a);
  const Scratch scratch = split(a);
  int32_t* start = a.kernel->row_starts && a.pieces ? scratch.start : nullptr;
  const bool copy = a.depth % a.kernel->depth_step != 0;
  const int8_t* from = a.x;
  const int64_t ld_from = a.ldx;
  if (copy) a.x = scratch.x, a.ldx = round_up(a.depth, a.kernel->depth_step);
  a.start = start;
  if (copy || start)
    parallel_for(0, a.rows,
                 std::max<int64_t>(1, kWorthAThread / 16 / std::max<int64_t>(a.depth, 1)),
                 [&](int64_t m0, int64_t m1) {
                   if (copy)
                     for (int64_t m = m0; m < m1; ++m) {
                       int8_t* row = scratch.x + m * a.ldx;
                       std::memcpy(row, from + m * ld_from, a.depth);
                       std::memset(row + a.depth, 0, a.ldx - a.depth);
                     }
                   if (start)
                     a.kernel->row_starts(a.x + m0 * a.ldx, a.ldx, m1 - m0, a.depth, a.piece,
                                          start + m0 * a.pieces);
                 });
  multiply(a);
}

int64_t linear_dynamic_int8_scratch(int64_t rows, int64_t depth, int64_t group) {
  const int64_t pieces = std::max<int64_t>(1, count_pieces(depth, group));
  return linear_int8_scratch(rows, depth, group) + rows * (pieces + 1) * 4 + 64;
}

void linear_dynamic_int8_run(LinearDynamicInt8Args d) {
  LinearInt8Args& a = d.linear;
  if (a.rows == 0) return;
  complete(a);
  const Scratch scratch = split(a);
  const int64_t scales = a.group ? a.pieces : 1;
  a.ldx = round_up(a.depth, a.kernel->depth_step);
  a.x = scratch.x;
  float* scale = reinterpret_cast<float*>(static_cast<char*>(a.scratch) +
                                          linear_int8_scratch(a.rows, a.depth, a.group));
  int32_t* zero = d.asymmetric ? reinterpret_cast<int32_t*>(scale + a.rows * scales) : nullptr;
  a.x_scale = scale, a.x_scale_stride = scales, a.x_zero_point = zero;
  int32_t* start = a.kernel->row_starts && a.pieces ? scratch.start : nullptr;
  a.start = start;
  const QuantizeKernel& quantise = quantize_kernel();
  const int64_t group = a.group ? a.group : a.depth, x_bytes = element_size(d.x_dtype);
  std::atomic<bool> finite{true};
  parallel_for(0, a.rows, std::max<int64_t>(1, kWorthAThread / 64 / std::max<int64_t>(a.depth, 1)),
               [&](int64_t m0, int64_t m1) {
                 QuantizeFindings found;
                 for (int64_t m = m0; m < m1; ++m) {
                   const char* x = static_cast<const char*>(d.x) + m * d.ldx * x_bytes;
                   int8_t* q = scratch.x + m * a.ldx;
                   quantize_row(quantise, x, d.x_dtype, group, scales, q, scale + m * scales,
                                zero ? zero + m : nullptr, &found);
                   std::memset(q + a.depth, 0, a.ldx - a.depth);
                   if (start)
                     a.kernel->row_starts(q, a.ldx, 1, a.depth, a.piece, start + m * a.pieces);
                 }
                 count_nan(found.nan);
                 if (!found.finite) finite.store(false, std::memory_order_relaxed);
               });
  NC_CHECK(!d.strict || finite, "linear_dynamic_int8",
           "x must be finite (strict), got NaN or infinity");
  if (a.columns) multiply(a);
}

}  // namespace narrowcast
