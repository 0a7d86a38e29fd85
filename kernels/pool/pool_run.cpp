// Selection and the parallel loop.
#include <algorithm>

#include "common/parallel.h"
#include "common/registry.h"
#include "pool/pool.h"

namespace narrowcast {
namespace {

constexpr Variant<const PoolKernel*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &pool_##name},
#include "pool/pool.inc"
#undef KERNEL
};
NC_VARIANT_LIST(pool, const PoolKernel*, kVariants)

constexpr int64_t kChannelBlock = 512;

}  // namespace

void pool_run(const PoolArgs& a) {
  const int64_t rows = a.images * a.out_height;
  if (rows == 0 || a.channels == 0 || a.out_width == 0) return;
  const PoolKernel& kernel = *select_pool();
  const PoolRowFn run = a.is_max ? kernel.max : kernel.average;
  const int64_t blocks = (a.channels + kChannelBlock - 1) / kChannelBlock;
  const int64_t taps =
      std::min(a.window.kernel[0], a.height) * std::min(a.window.kernel[1], a.width);
  const int64_t cost =
      std::max<int64_t>(1, taps * a.out_width * std::min(a.channels, kChannelBlock));
  parallel_for(0, rows * blocks, std::max<int64_t>(1, (a.is_max ? 1 << 18 : 1 << 16) / cost),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t c0 = i % blocks * kChannelBlock;
                   run(a, i / blocks, c0, std::min(a.channels, c0 + kChannelBlock));
                 }
               });
}

}  // namespace narrowcast
