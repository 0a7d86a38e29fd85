// Selection, the positions and the parallel loop.
#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "common/tensor.h"
#include "rope/rope.h"

namespace narrowcast {
namespace {

constexpr Variant<RopeFn> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &rope_##name},
#include "rope/rope.inc"
#undef KERNEL
};
NC_VARIANT_LIST(rope, RopeFn, kVariants)

int64_t given_position(const RopeArgs& a, int64_t b, int64_t s) {
  const int64_t i = b * a.positions_batch + (a.explicit_positions ? s * a.positions_length : 0);
  return a.positions_dtype == DType::kInt32 ? static_cast<const int32_t*>(a.positions)[i]
                                            : static_cast<const int64_t*>(a.positions)[i];
}

int64_t position(const RopeArgs& a, int64_t b, int64_t s) {
  if (!a.positions) return s;
  return given_position(a, b, s) + (a.explicit_positions ? 0 : s);
}

void check_positions(const RopeArgs& a) {
  if (!a.positions) {
    NC_CHECK(a.length <= a.table_rows, "rope", "cos must have a row for each of the ", a.length,
             " positions of x, got ", a.table_rows);
    return;
  }
  const int64_t each = a.explicit_positions ? a.length : 1;
  const int64_t last = a.table_rows - (a.explicit_positions ? 1 : a.length);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t s = 0; s < each; ++s) {
      const int64_t p = given_position(a, b, s);
      NC_CHECK(p >= 0 && p <= last, "rope", "positions must be 0 .. ", last, " for tables of ",
               a.table_rows, " rows, got ", p);
    }
}

}  // namespace

void rope_run(const RopeArgs& a) {
  if (a.batch == 0 || a.heads == 0 || a.length == 0) return;
  check_positions(a);
  if (a.depth == 0) return;
  const RopeFn kernel = select_rope();
  const int64_t size = element_size(a.dtype), table_row = a.half * element_size(a.table_dtype);
  const int64_t grain = std::max<int64_t>(1, 8192 / a.depth);
  parallel_for(0, a.batch * a.heads * a.length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t s = row % a.length, h = row / a.length % a.heads, b = row / a.length / a.heads;
      const int64_t at = b * a.stride_batch + h * a.stride_head + s * a.stride_length;
      const int64_t table = position(a, b, s) * table_row;
      kernel(static_cast<const char*>(a.x) + at * size,
             static_cast<char*>(a.out) + row * a.depth * size, a.dtype,
             static_cast<const char*>(a.cos) + table, static_cast<const char*>(a.sin) + table,
             a.table_dtype, a.half, a.depth, a.interleaved);
    }
  });
}

}  // namespace narrowcast
