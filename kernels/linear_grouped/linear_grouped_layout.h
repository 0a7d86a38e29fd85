// Where the parts of packed weights lie. Not for ISA files.
#pragma once
#include <numeric>

#include "linear_grouped/linear_grouped.h"

namespace narrowcast {

inline GroupedLayout grouped_layout(int64_t n, int64_t k, int64_t group, int bits, bool half,
                                    bool has_offset) {
  GroupedLayout l = {};
  l.n = n, l.k = k, l.group = group, l.bits = bits, l.half = half, l.has_offset = has_offset;
  l.block = std::gcd<int64_t>(group, 128);
  l.code_bytes = kGroupedPanel * k * bits / 8;
  l.scale_bytes = kGroupedPanel * (k / l.block) * (half ? 2 : 4);
  l.panel_bytes = (l.code_bytes + l.scale_bytes * (has_offset ? 2 : 1) + 63) / 64 * 64;
  return l;
}

}  // namespace narrowcast
