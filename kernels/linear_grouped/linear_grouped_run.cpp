// Packing, selection and the parallel loop: raw pointers in, no torch.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "common/parallel.h"
#include "common/registry.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "linear_grouped/linear_grouped.h"

namespace narrowcast {
namespace {

constexpr Variant<const GroupedKernels*> kVariants[] = {
#define KERNEL(name, isa) {#name, isa, &linear_grouped_##name},
#include "linear_grouped/linear_grouped.inc"
#undef KERNEL
};
NC_VARIANT_LIST(linear_grouped, const GroupedKernels*, kVariants)

constexpr int kChunk = 16;  // panels whose sums one task keeps before it finishes a row
constexpr int64_t kChunkBytes = 256 * 1024;  // of weights: they stay in L2 while all rows of x pass
constexpr int64_t kTaskWork = 1 << 19;       // multiply-adds worth a thread

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t panel_count(const GroupedLayout& l) { return (l.n + kGroupedPanel - 1) / kGroupedPanel; }

// Where the parts of the scratch lie.
struct Scratch {
  int64_t xq, x, xs, xsum, start, bytes;
};

Scratch scratch_layout(const LinearGroupedArgs& a) {
  const int64_t blocks = a.layout.k / a.layout.block;
  const bool integer = a.activation_bits == 8;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  Scratch s = {};
  s.xsum = take(a.m * blocks * 4);
  if (integer)
    s.xq = take(a.m * a.layout.k), s.xs = take(a.m * blocks * 4), s.start = take(a.m * blocks * 4);
  if (a.x_dtype != DType::kFloat32) s.x = take(a.m * a.layout.k * 4);
  s.bytes = at;
  return s;
}

// Rows of x in the form the kernels read.
GroupedRows prepare_rows(const LinearGroupedArgs& a, const GroupedKernels& kernels,
                         uint8_t* scratch) {
  const GroupedLayout& l = a.layout;
  const Scratch s = scratch_layout(a);
  const int64_t blocks = l.k / l.block;
  const bool integer = a.activation_bits == 8, wide = a.x_dtype == DType::kFloat32;
  int8_t* xq = reinterpret_cast<int8_t*>(scratch + s.xq);
  float* widened = reinterpret_cast<float*>(scratch + s.x);
  float* xs = reinterpret_cast<float*>(scratch + s.xs);
  float* xsum = reinterpret_cast<float*>(scratch + s.xsum);
  int32_t* start = reinterpret_cast<int32_t*>(scratch + s.start);
  const float* x = wide ? static_cast<const float*>(a.x) : widened;
  if (integer || !wide || l.has_offset)
    parallel_for(0, a.m, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, l.k)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t m = begin; m < end; ++m) {
                     const float* row = x + m * l.k;
                     if (!wide)
                       kernels.widen(static_cast<const uint16_t*>(a.x) + m * l.k, a.x_dtype, l.k,
                                     widened + m * l.k);
                     if (integer)
                       kernels.quantize(l, row, xq + m * l.k, xs + m * blocks, xsum + m * blocks,
                                        start + m * blocks);
                     else if (l.has_offset)
                       kernels.sum(row, l.block, blocks, xsum + m * blocks);
                   }
                 });
  return {integer ? xq : nullptr, x, integer ? xs : nullptr, xsum, integer ? start : nullptr};
}

// Tasks: chunks of panels, and ranges of rows where there are too few chunks for the threads.
struct Tasks {
  int64_t panels, per_chunk, chunks, ranges, range_rows, grain;
};

Tasks share(const LinearGroupedArgs& a) {
  const GroupedLayout& l = a.layout;
  const int64_t threads = thread_count(), wanted = threads == 1 ? 1 : threads * 4;
  Tasks t = {};
  t.panels = panel_count(l);
  const int64_t fit = kChunkBytes / std::max<int64_t>(1, l.panel_bytes);
  t.per_chunk =
      std::min<int64_t>({kChunk, (t.panels + wanted - 1) / wanted, std::max<int64_t>(1, fit)});
  t.chunks = (t.panels + t.per_chunk - 1) / t.per_chunk;
  const int64_t tiles = (a.m + kGroupedMaxRows - 1) / kGroupedMaxRows;
  t.ranges = std::min(tiles, (wanted + t.chunks - 1) / t.chunks);
  t.range_rows = (tiles + t.ranges - 1) / t.ranges * kGroupedMaxRows;
  const int64_t columns = t.per_chunk * kGroupedPanel;
  t.grain = std::max<int64_t>(
      1, kTaskWork / (columns * std::max<int64_t>(1, l.k) * std::min(t.range_rows, a.m)));
  return t;
}

// `fresh`: memory for a chunk of panels, when the weights are packed on the way.
void run_task(const LinearGroupedArgs& a, const GroupedKernels& kernels, const GroupedRows& x,
              const Tasks& t, int64_t task, void* fresh) {
  const GroupedLayout& l = a.layout;
  constexpr int64_t kLd = kChunk * kGroupedPanel;
  alignas(64) float acc[kGroupedMaxRows * kLd];
  const int64_t first = task / t.ranges * t.per_chunk,
                count = std::min(t.per_chunk, t.panels - first);
  const int64_t column = first * kGroupedPanel,
                columns = std::min(count * kGroupedPanel, l.n - column);
  if (fresh) grouped_pack(l, a.source, first, count, static_cast<uint8_t*>(fresh));
  const uint8_t* weights = fresh ? static_cast<uint8_t*>(fresh) : a.panels + first * l.panel_bytes;
  const GroupedPanelFn panel = a.activation_bits == 8 ? kernels.panel8 : kernels.panel16;
  const int64_t begin = task % t.ranges * t.range_rows, end = std::min(a.m, begin + t.range_rows);
  for (int64_t m = begin; m < end; m += kGroupedMaxRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kGroupedMaxRows, end - m));
    const GroupedRows tile = rows_from(x, l, m);
    for (int64_t p = 0; p < count; ++p)
      panel(l, weights + p * l.panel_bytes, tile, rows, acc + p * kGroupedPanel, kLd);
    for (int r = 0; r < rows; ++r)
      kernels.finish(a.epilogue, acc + r * kLd, m + r, column, columns);
  }
}

}  // namespace

GroupedLayout grouped_layout(int64_t n, int64_t k, int64_t group, int bits, bool half,
                             bool has_offset) {
  GroupedLayout l = {};
  l.n = n, l.k = k, l.group = group, l.bits = bits, l.half = half, l.has_offset = has_offset;
  l.block = std::gcd<int64_t>(group, 128);
  l.code_bytes = kGroupedPanel * k * bits / 8;
  l.scale_bytes = kGroupedPanel * (k / l.block) * (half ? 2 : 4);
  l.panel_bytes = round_up(l.code_bytes + l.scale_bytes * (has_offset ? 2 : 1), 64);
  return l;
}

int64_t grouped_packed_bytes(const GroupedLayout& l) { return panel_count(l) * l.panel_bytes; }

void grouped_pack(const GroupedLayout& l, const GroupedSource& source, int64_t first, int64_t count,
                  uint8_t* out) {
  const int64_t row_bytes = l.k * l.bits / 8, blocks = l.k / l.block, groups = l.k / l.group;
  const int64_t repeat = l.group / l.block, size = l.half ? 2 : 4;
  const uint32_t flip = l.bits == 8 ? 0x80808080u : 0;
  const auto spread = [&](const void* from, int64_t row, int r, uint8_t* to) {
    const uint8_t* values = static_cast<const uint8_t*>(from) + row * groups * size;
    for (int64_t b = 0; b < blocks; ++b)
      std::memcpy(to + (b * kGroupedPanel + r) * size, values + b / repeat * size, size);
  };
  for (int64_t p = 0; p < count; ++p, out += l.panel_bytes) {
    const int64_t row = (first + p) * kGroupedPanel;
    const int rows = static_cast<int>(std::min<int64_t>(kGroupedPanel, l.n - row));
    if (rows < kGroupedPanel) std::memset(out, 0, l.panel_bytes);
    const uint8_t* codes = source.codes + row * row_bytes;
    for (int64_t d = 0; d < row_bytes / 4; ++d)
      for (int r = 0; r < rows; ++r) {
        uint32_t v;
        std::memcpy(&v, codes + r * row_bytes + d * 4, 4);
        v ^= flip;
        std::memcpy(out + (d * kGroupedPanel + r) * 4, &v, 4);
      }
    for (int r = 0; r < rows; ++r) {
      spread(source.scale, row + r, r, out + l.code_bytes);
      if (l.has_offset) spread(source.offset, row + r, r, out + l.code_bytes + l.scale_bytes);
    }
    const int64_t used = l.code_bytes + l.scale_bytes * (l.has_offset ? 2 : 1);
    std::memset(out + used, 0, l.panel_bytes - used);
  }
}

void grouped_pack_all(const GroupedLayout& l, const GroupedSource& source, uint8_t* out) {
  parallel_for(0, panel_count(l), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, l.panel_bytes)),
               [&](int64_t begin, int64_t end) {
                 grouped_pack(l, source, begin, end - begin, out + begin * l.panel_bytes);
               });
}

int64_t linear_grouped_scratch(const LinearGroupedArgs& args) { return scratch_layout(args).bytes; }

void linear_grouped_run(const LinearGroupedArgs& a, void* scratch) {
  if (a.m == 0 || a.layout.n == 0) return;
  const GroupedKernels& kernels = *select_linear_grouped();
  const GroupedRows x = prepare_rows(a, kernels, static_cast<uint8_t*>(scratch));
  const Tasks t = share(a);
  parallel_for(0, t.chunks * t.ranges, t.grain, [&](int64_t begin, int64_t end) {
    std::optional<ThreadScratch> fresh;
    if (!a.panels) fresh.emplace(t.per_chunk * a.layout.panel_bytes);
    for (int64_t i = begin; i < end; ++i)
      run_task(a, kernels, x, t, i, fresh ? fresh->data() : nullptr);
  });
}

}  // namespace narrowcast
