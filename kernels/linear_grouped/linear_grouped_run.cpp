// Packing, selection and the parallel loop: raw pointers in, no torch.
#include <algorithm>
#include <cstring>
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

// Rows per tile: as even as can be.
int64_t tile_rows(int64_t m) {
  const int64_t tiles = (m + kGroupedMaxRows - 1) / kGroupedMaxRows;
  return tiles ? (m + tiles - 1) / tiles : 1;
}

// The scratch: for each tile its parts, one behind the other, in as much memory as a full tile
// takes.
struct Scratch {
  int64_t x, xs, xsum, start, tile_bytes;
};

Scratch scratch_layout(const LinearGroupedArgs& a) {
  const int64_t rows = tile_rows(a.m),
                meta = round_up(rows * (a.layout.k / a.layout.block) * 4, 64);
  const bool integer = a.activation_bits == 8;
  Scratch s = {};
  s.xsum = round_up(rows * a.layout.k * (integer ? 1 : 4), 64);
  s.xs = s.xsum + meta;
  s.start = s.xs + meta;
  s.tile_bytes = integer ? s.start + meta : s.xs;
  return s;
}

GroupedTile tile_at(const LinearGroupedArgs& a, void* scratch, int64_t tile) {
  const Scratch s = scratch_layout(a);
  const int64_t rows = tile_rows(a.m);
  uint8_t* base = static_cast<uint8_t*>(scratch) + tile * s.tile_bytes;
  GroupedTile t = {};
  t.ld = static_cast<int>(std::min(rows, a.m - tile * rows));
  t.xsum = reinterpret_cast<float*>(base + s.xsum);
  if (a.activation_bits == 16) {
    t.x = reinterpret_cast<float*>(base);
    return t;
  }
  t.xq = reinterpret_cast<int8_t*>(base);
  t.xs = reinterpret_cast<float*>(base + s.xs);
  t.start = reinterpret_cast<int32_t*>(base + s.start);
  return t;
}

void prepare_rows(const LinearGroupedArgs& a, const GroupedKernels& kernels, void* scratch) {
  const int64_t rows = tile_rows(a.m), row_bytes = a.layout.k * element_size(a.x_dtype);
  const GroupedPrepareFn prepare = a.activation_bits == 8 ? kernels.prepare8 : kernels.prepare16;
  parallel_for(0, a.m, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.layout.k)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t m = begin; m < end; ++m)
                   prepare(a.layout, static_cast<const uint8_t*>(a.x) + m * row_bytes, a.x_dtype,
                           static_cast<int>(m % rows), tile_at(a, scratch, m / rows));
               });
}

// Tasks: chunks of panels, and ranges of rows where there are too few chunks for the threads.
struct Tasks {
  int64_t panels, per_chunk, chunks, tiles, ranges, range_tiles, grain;
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
  t.tiles = (a.m + tile_rows(a.m) - 1) / tile_rows(a.m);
  t.ranges = std::min(t.tiles, (wanted + t.chunks - 1) / t.chunks);
  t.range_tiles = (t.tiles + t.ranges - 1) / t.ranges;
  const int64_t rows = std::min(t.range_tiles * tile_rows(a.m), a.m);
  const int64_t work = t.per_chunk * kGroupedPanel * std::max<int64_t>(1, l.k) * rows;
  t.grain = std::max<int64_t>(1, kTaskWork / work);
  return t;
}

// `fresh`: memory for a chunk of panels, when the weights are packed on the way.
void run_task(const LinearGroupedArgs& a, const GroupedKernels& kernels, void* scratch,
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
  const int64_t begin = task % t.ranges * t.range_tiles;
  for (int64_t i = begin; i < std::min(t.tiles, begin + t.range_tiles); ++i) {
    const GroupedTile tile = tile_at(a, scratch, i);
    for (int64_t p = 0; p < count; ++p)
      panel(l, weights + p * l.panel_bytes, tile, acc + p * kGroupedPanel, kLd);
    for (int r = 0; r < tile.ld; ++r)
      kernels.finish(a.epilogue, acc + r * kLd, i * tile_rows(a.m) + r, column, columns);
  }
}

// Scales of `rows` rows, one row behind the other, to [block][16].
template <class T>
void spread_scales(const T* from, int64_t groups, int64_t repeat, int rows, uint8_t* out) {
  T* to = reinterpret_cast<T*>(out);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < repeat; ++i, to += kGroupedPanel)
      for (int r = 0; r < rows; ++r) to[r] = from[r * groups + g];
}

}  // namespace

int64_t grouped_packed_bytes(const GroupedLayout& l) { return panel_count(l) * l.panel_bytes; }

void grouped_pack(const GroupedLayout& l, const GroupedSource& source, int64_t first, int64_t count,
                  uint8_t* out) {
  const int64_t row_bytes = l.k * l.bits / 8, groups = l.k / l.group, repeat = l.group / l.block;
  const GroupedKernels& kernels = *select_linear_grouped();
  const uint32_t flip = l.bits == 8 ? 0x80808080u : 0;
  for (int64_t p = 0; p < count; ++p, out += l.panel_bytes) {
    const int64_t row = (first + p) * kGroupedPanel;
    const int rows = static_cast<int>(std::min<int64_t>(kGroupedPanel, l.n - row));
    const uint8_t* codes = source.codes + row * row_bytes;
    if (rows == kGroupedPanel) {
      kernels.pack(codes, row_bytes, row_bytes / 4, flip, out);
    } else {
      std::memset(out, 0, l.panel_bytes);
      for (int64_t d = 0; d < row_bytes / 4; ++d)
        for (int r = 0; r < rows; ++r) {
          uint32_t v;
          std::memcpy(&v, codes + r * row_bytes + d * 4, 4);
          v ^= flip;
          std::memcpy(out + (d * kGroupedPanel + r) * 4, &v, 4);
        }
    }
    const auto spread = [&](const void* from, uint8_t* to) {
      if (l.half)
        spread_scales(static_cast<const uint16_t*>(from) + row * groups, groups, repeat, rows, to);
      else
        spread_scales(static_cast<const uint32_t*>(from) + row * groups, groups, repeat, rows, to);
    };
    spread(source.scale, out + l.code_bytes);
    if (l.has_offset) spread(source.offset, out + l.code_bytes + l.scale_bytes);
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

int64_t linear_grouped_scratch(const LinearGroupedArgs& args) {
  const int64_t rows = tile_rows(args.m);
  return (args.m + rows - 1) / rows * scratch_layout(args).tile_bytes;
}

void linear_grouped_run(const LinearGroupedArgs& a, void* scratch) {
  if (a.m == 0 || a.layout.n == 0) return;
  const GroupedKernels& kernels = *select_linear_grouped();
  prepare_rows(a, kernels, scratch);
  const Tasks t = share(a);
  parallel_for(0, t.chunks * t.ranges, t.grain, [&](int64_t begin, int64_t end) {
    std::optional<ThreadScratch> fresh;
    if (!a.panels) fresh.emplace(t.per_chunk * a.layout.panel_bytes);
    for (int64_t i = begin; i < end; ++i)
      run_task(a, kernels, scratch, t, i, fresh ? fresh->data() : nullptr);
  });
}

}  // namespace narrowcast
