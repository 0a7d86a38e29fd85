// Selection and the parallel loops.
#include <algorithm>
#include <atomic>

#include "common/parallel.h"
#include "common/registry.h"
#include "common/tensor.h"
#include "quantize/quantize.h"

namespace narrowcast {
namespace {

constexpr Variant<const QuantizeKernel*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &quantize_##name},
#include "quantize/quantize.inc"
#undef KERNEL
};
NC_VARIANT_LIST(quantize, const QuantizeKernel*, kVariants)

constexpr int64_t kWorthAThread = 16384;  // elements
std::atomic<int64_t> g_nan_count{0};

}  // namespace

const QuantizeKernel& quantize_kernel() { return *select_quantize(); }

int64_t nan_count(bool reset) { return reset ? g_nan_count.exchange(0) : g_nan_count.load(); }

void count_nan(int64_t found) {
  if (found) g_nan_count += found;
}

bool quantize_rows_run(const QuantizeRowsArgs& a) {
  if (a.rows == 0) return true;
  const QuantizeKernel& kernel = quantize_kernel();
  // A row without columns still has its scale (1).
  const int64_t group = std::max<int64_t>(a.group, 1);
  const int64_t groups = a.columns == 0 ? (a.group == a.columns ? 1 : 0) : a.columns / group;
  const int64_t step = element_size(a.dtype);
  std::atomic<bool> finite{true};
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(a.columns, 1));
  parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    QuantizeFindings found;
    for (int64_t m = begin; m < end; ++m) {
      const char* x = static_cast<const char*>(a.x) + m * a.ld_x * step;
      quantize_row(kernel, x, a.dtype, std::min(group, a.columns), groups, a.q + m * a.columns,
                   a.scale + m * groups, a.zero_point ? a.zero_point + m : nullptr, &found);
    }
    count_nan(found.nan);
    if (!found.finite) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

bool quantize_static_run(const QuantizeStaticArgs& a) {
  const QuantizeStaticFn kernel = quantize_kernel().by_scale;
  const float inverse = 1.0f / a.scale;
  const int64_t step = element_size(a.dtype);
  std::atomic<bool> finite{true};
  parallel_for(0, a.count, kWorthAThread, [&](int64_t begin, int64_t end) {
    QuantizeFindings found;
    kernel(static_cast<const char*>(a.x) + begin * step, a.dtype, end - begin, inverse,
           a.zero_point, a.is_signed, static_cast<char*>(a.q) + begin, &found);
    count_nan(found.nan);
    if (!found.finite) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

}  // namespace narrowcast
