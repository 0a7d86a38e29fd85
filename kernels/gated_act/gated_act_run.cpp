// Selection and the parallel loop.
#include "gated_act/gated_act.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/registry.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr Variant<GatedActFn> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &gated_act_##name},
#include "gated_act/gated_act.inc"
#undef KERNEL
};
NC_VARIANT_LIST(gated_act, GatedActFn, kVariants)

constexpr int64_t kWorthAThread = 8192;  // elements

}  // namespace

void gated_act_run(const GatedActArgs& a) {
  if (a.rows == 0) return;
  if (a.columns == 0) {  // q is empty, perhaps null; a row still has its scale
    if (a.scale && a.group == 0) std::fill_n(a.scale, a.rows, 1.0f);
    return;
  }
  const GatedActFn kernel = select_gated_act();
  const int64_t size = element_size(a.dtype);
  const char *gate = static_cast<const char*>(a.gate), *up = static_cast<const char*>(a.up);
  if (!a.scale) {
    char* y = static_cast<char*>(a.y);
    const bool flat = a.rows == 1 || (a.ld_gate == a.columns && a.ld_up == a.columns);
    const int64_t rows = flat ? 1 : a.rows, columns = flat ? a.rows * a.columns : a.columns;
    // Elements in order of memory, a range of them per thread, cut at the ends of rows.
    parallel_for(0, rows * columns, kWorthAThread, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t m = begin / columns, k = begin % columns;
        const int64_t count = std::min(columns - k, end - begin);
        kernel(gate + (m * a.ld_gate + k) * size, up + (m * a.ld_up + k) * size, a.dtype,
               y + begin * size, a.dtype, count, a.activation);
        begin += count;
      }
    });
    return;
  }
  const QuantizeRowFn quantize = quantize_kernel().row;
  const int64_t groups = a.columns / a.group;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / a.columns);
  parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(a.columns * static_cast<int64_t>(sizeof(float)));
    float* work = static_cast<float*>(scratch.data());
    QuantizeFindings found;
    for (int64_t m = begin; m < end; ++m) {
      kernel(gate + m * a.ld_gate * size, up + m * a.ld_up * size, a.dtype, work, DType::kFloat32,
             a.columns, a.activation);
      for (int64_t g = 0; g < groups; ++g)
        quantize(work + g * a.group, DType::kFloat32, a.group, false,
                 a.q + m * a.columns + g * a.group, a.scale + m * groups + g, nullptr, &found);
    }
    count_nan(found.nan);
  });
}

}  // namespace narrowcast
