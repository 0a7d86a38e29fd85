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
constexpr int kWidePanels = kGroupedWide / kGroupedPanel;
// Rows of x from which the wide kernel pays for what it unpacks.
constexpr int64_t kWideFrom = 24;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t panel_count(const GroupedLayout& l) { return (l.n + kGroupedPanel - 1) / kGroupedPanel; }

// Kernels, and which of their forms this call takes.
struct Plan {
  const GroupedKernels& kernels;
  GroupedPrepareFn prepare;
  GroupedPanelFn panel;
  GroupedWideFn wide;  // nullptr: panel
  int64_t rows;        // per tile: one, or as even as can be
};

Plan plan(const LinearGroupedArgs& a) {
  const GroupedKernels& k = *select_linear_grouped();
  const int bits = a.activation_bits;
  GroupedWideFn wide = bits == 8 ? k.wide8 : bits == 16 ? k.wide16 : nullptr;
  if (a.m < kWideFrom) wide = nullptr;
  const int64_t tiles = (a.m + kGroupedMaxRows - 1) / kGroupedMaxRows;
  return {k,
          bits == 8    ? k.prepare8
          : bits == 16 ? k.prepare16
                       : k.prepare32,
          bits == 8    ? k.panel8
          : bits == 16 ? k.panel16
                       : k.panel32,
          wide, wide || !tiles ? 1 : (a.m + tiles - 1) / tiles};
}

// The scratch: for each tile its parts, one behind the other, in as much memory as a full tile
// takes.
struct Scratch {
  int64_t x, xl, xs, xsum, start, tile_bytes;
};

Scratch scratch_layout(const LinearGroupedArgs& a, int64_t rows) {
  const int64_t codes = round_up(rows * a.layout.k, 64),
                meta = round_up(rows * (a.layout.k / a.layout.block) * 4, 64);
  Scratch s = {};
  if (a.activation_bits == 32) {
    s.xsum = codes * 4;
    s.tile_bytes = s.xsum + meta;
    return s;
  }
  s.xl = codes;
  s.xsum = a.activation_bits == 16 ? 2 * codes : codes;
  s.start = s.xsum + meta;
  s.xs = s.start + meta;
  s.tile_bytes = s.xs + (a.activation_bits == 16 ? round_up(rows * 4, 64) : meta);
  return s;
}

GroupedTile tile_at(const LinearGroupedArgs& a, const Plan& p, void* scratch, int64_t tile) {
  const Scratch s = scratch_layout(a, p.rows);
  uint8_t* base = static_cast<uint8_t*>(scratch) + tile * s.tile_bytes;
  GroupedTile t = {};
  t.ld = static_cast<int>(std::min(p.rows, a.m - tile * p.rows));
  t.xsum = reinterpret_cast<float*>(base + s.xsum);
  if (a.activation_bits == 32) {
    t.x = reinterpret_cast<float*>(base);
    return t;
  }
  t.xq = reinterpret_cast<int8_t*>(base);
  t.xl = reinterpret_cast<int8_t*>(base + s.xl);
  t.xs = reinterpret_cast<float*>(base + s.xs);
  t.start = reinterpret_cast<int32_t*>(base + s.start);
  return t;
}

void prepare_rows(const LinearGroupedArgs& a, const Plan& p, void* scratch) {
  const int64_t row_bytes = a.layout.k * element_size(a.x_dtype);
  parallel_for(0, a.m, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.layout.k)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t m = begin; m < end; ++m)
                   p.prepare(a.layout, static_cast<const uint8_t*>(a.x) + m * row_bytes, a.x_dtype,
                             static_cast<int>(m % p.rows), tile_at(a, p, scratch, m / p.rows));
               });
}

// Tasks: chunks of panels, and ranges of rows where there are too few chunks for the threads.
struct Tasks {
  int64_t panels, per_chunk, chunks, tiles, ranges, range_tiles, grain;
};

Tasks share(const LinearGroupedArgs& a, const Plan& p) {
  const GroupedLayout& l = a.layout;
  const int64_t threads = thread_count(), wanted = threads == 1 ? 1 : threads * 4;
  Tasks t = {};
  t.panels = panel_count(l);
  const int64_t fit = kChunkBytes / std::max<int64_t>(1, l.panel_bytes);
  t.per_chunk = p.wide ? kWidePanels
                       : std::min<int64_t>(
                             {kChunk, (t.panels + wanted - 1) / wanted, std::max<int64_t>(1, fit)});
  t.chunks = (t.panels + t.per_chunk - 1) / t.per_chunk;
  t.tiles = (a.m + p.rows - 1) / p.rows;
  // A range of the wide kernel repays its unpacking as a whole call does.
  const int64_t most = p.wide ? a.m / kWideFrom : t.tiles;
  t.ranges = std::min(most, (wanted + t.chunks - 1) / t.chunks);
  t.range_tiles = (t.tiles + t.ranges - 1) / t.ranges;
  if (p.wide) t.range_tiles = round_up(t.range_tiles, kGroupedWideRows);
  const int64_t rows = std::min(t.range_tiles * p.rows, a.m);
  const int64_t work = t.per_chunk * kGroupedPanel * l.k * rows;
  t.grain = std::max<int64_t>(1, kTaskWork / work);
  return t;
}

int64_t wide_bytes(const GroupedLayout& l) {
  return kGroupedWide * (l.k + l.k / l.block * 2 * static_cast<int64_t>(sizeof(float)));
}

// Asks for the lines that a tile of results will be written to, while its sums are being made.
void prefetch_out(const Epilogue& e, int64_t m, int rows, int64_t column, int64_t columns) {
  const int64_t size = element_size(e.out_dtype);
  for (int64_t r = m; r < m + rows; ++r) {
    const char* first = static_cast<const char*>(e.out) + (r * e.ld_out + column) * size;
    for (int64_t i = 0; i < columns * size; i += 64) __builtin_prefetch(first + i, 1);
  }
}

// `memory`: for the wide form of the panels, and behind it for panels packed on the way.
void run_task(const LinearGroupedArgs& a, const Plan& plan, void* scratch, const Tasks& t,
              int64_t task, uint8_t* memory) {
  const GroupedLayout& l = a.layout;
  constexpr int64_t kLd = kChunk * kGroupedPanel;
  alignas(64) float acc[kGroupedMaxRows * kLd];
  const int64_t first = task / t.ranges * t.per_chunk,
                count = std::min(t.per_chunk, t.panels - first);
  const int64_t column = first * kGroupedPanel,
                columns = std::min(count * kGroupedPanel, l.n - column);
  const uint8_t* weights = a.panels ? a.panels + first * l.panel_bytes : nullptr;
  if (!weights) {
    uint8_t* fresh = memory + (plan.wide ? wide_bytes(l) : 0);
    grouped_pack(l, a.source, first, count, fresh);
    weights = fresh;
  }
  const int64_t begin = task % t.ranges * t.range_tiles,
                end = std::min(t.tiles, begin + t.range_tiles);
  if (plan.wide) {
    const GroupedWide wide = plan.kernels.widen(l, weights, count, memory);
    const int64_t row_bytes = scratch_layout(a, 1).tile_bytes;
    for (int64_t m = begin; m < end; m += kGroupedWideRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kGroupedWideRows, end - m));
      prefetch_out(a.epilogue, m, rows, column, columns);
      plan.wide(l, wide, tile_at(a, plan, scratch, m), row_bytes, rows, acc);
      for (int r = 0; r < rows; ++r)
        plan.kernels.finish(a.epilogue, acc + r * kGroupedWide, m + r, column, columns);
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const GroupedTile tile = tile_at(a, plan, scratch, i);
    for (int64_t p = 0; p < count; ++p)
      plan.panel(l, weights + p * l.panel_bytes, tile, acc + p * kGroupedPanel, kLd);
    for (int r = 0; r < tile.ld; ++r)
      plan.kernels.finish(a.epilogue, acc + r * kLd, i * plan.rows + r, column, columns);
  }
}

// K = 0: there are no weights, perhaps no memory for them, and every sum is 0.
void finish_empty_sums(const LinearGroupedArgs& a, GroupedFinishFn finish) {
  const float zeros[kGroupedPanel] = {};
  for (int64_t m = 0; m < a.m; ++m)
    for (int64_t n = 0; n < a.layout.n; n += kGroupedPanel)
      finish(a.epilogue, zeros, m, n, std::min<int64_t>(kGroupedPanel, a.layout.n - n));
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
  if (l.k == 0) return;
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
  // Whichever kernel will be selected: tiles of one row, or of several.
  const int64_t rows = plan(args).rows, tiles = (args.m + rows - 1) / rows;
  return std::max(tiles * scratch_layout(args, rows).tile_bytes,
                  args.m >= kWideFrom ? args.m * scratch_layout(args, 1).tile_bytes : 0);
}

void linear_grouped_run(const LinearGroupedArgs& a, void* scratch) {
  if (a.m == 0 || a.layout.n == 0) return;
  const Plan p = plan(a);
  if (a.layout.k == 0) return finish_empty_sums(a, p.kernels.finish);
  prepare_rows(a, p, scratch);
  const Tasks t = share(a, p);
  const int64_t bytes =
      (p.wide ? wide_bytes(a.layout) : 0) + (a.panels ? 0 : t.per_chunk * a.layout.panel_bytes);
  parallel_for(0, t.chunks * t.ranges, t.grain, [&](int64_t begin, int64_t end) {
    std::optional<ThreadScratch> memory;
    if (bytes) memory.emplace(bytes);
    for (int64_t i = begin; i < end; ++i)
      run_task(a, p, scratch, t, i, memory ? static_cast<uint8_t*>(memory->data()) : nullptr);
  });
}

}  // namespace narrowcast
