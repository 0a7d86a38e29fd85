// How a product of M rows and N columns is shared among threads. Not for ISA files.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/parallel.h"

namespace narrowcast {

constexpr int64_t kRowBlock = 96;  // rows of x that stay in L2 while panels of weights pass
constexpr int64_t kWorthAThread = 64 * 16384;  // int8 products: about 5 microseconds

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// f(m0, m1, n0, n1) over pieces of at most kRowBlock rows and one panel of columns; a thread gets
// neighbours. row_cost: the price of one row times one column, in int8 products.
template <class F>
void parallel_tiles(int64_t rows, int64_t columns, int64_t panel, int64_t row_cost, F&& f) {
  const int64_t panels = (columns + panel - 1) / panel, chunks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t chunk = round_up((rows + chunks - 1) / chunks, 6);
  const int64_t cost = std::max<int64_t>(1, std::min(chunk, rows) * panel * row_cost);
  parallel_for(0, chunks * panels, std::max<int64_t>(1, kWorthAThread / cost),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const int64_t m0 = t / panels * chunk, n0 = t % panels * panel;
                   if (m0 < rows)
                     f(m0, std::min(rows, m0 + chunk), n0, std::min(columns, n0 + panel));
                 }
               });
}

}  // namespace narrowcast
