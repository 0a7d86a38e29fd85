// Selection and the parallel loop.
#include <algorithm>

#include "common/parallel.h"
#include "common/registry.h"
#include "common/scratch.h"
#include "norm/norm.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr Variant<NormRowFn> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &norm_row_##name},
#include "norm/norm.inc"
#undef KERNEL
};
NC_VARIANT_LIST(norm, NormRowFn, kVariants)

}  // namespace

void norm_run(const NormArgs& a) {
  if (a.rows == 0) return;
  if (a.columns == 0) {  // q is empty, perhaps null; a row still has its scale
    if (a.scale && a.group == 0) std::fill_n(a.scale, a.rows, 1.0f);
    return;
  }
  const int64_t groups = a.columns / a.group;
  const NormRowFn kernel = select_norm();
  const QuantizeRowFn quantize = quantize_kernel().row;
  const int64_t grain = std::max<int64_t>(1, 16384 / a.columns);
  parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(a.columns * static_cast<int64_t>(sizeof(float)));
    float* work = static_cast<float*>(scratch.data());
    QuantizeFindings found;
    for (int64_t m = begin; m < end; ++m) {
      kernel(a, m, work);
      if (!a.q) continue;
      for (int64_t g = 0; g < groups; ++g)
        quantize(work + g * a.group, DType::kFloat32, a.group, false,
                 a.q + m * a.columns + g * a.group, a.scale + m * groups + g, nullptr, &found);
    }
    count_nan(found.nan);
  });
}

}  // namespace narrowcast
