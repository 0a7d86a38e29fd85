// Weights packed for one kernel, as a tensor of bytes that says what it holds. The bytes are only
// good for the process (its CPU and NARROWCAST_ISA) that made them. Not for ISA files.
#pragma once
#include <cstring>

#include "common/stable.h"

namespace narrowcast {

struct PackedHeader {
  char magic[8];
  char layout[40];
  int64_t columns, depth;
};
static_assert(sizeof(PackedHeader) == 64, "the panels behind it stay aligned");

inline PackedHeader packed_header(const char* layout, int64_t columns, int64_t depth) {
  PackedHeader h = {};
  std::memcpy(h.magic, "ncpacked", sizeof h.magic);
  std::strncpy(h.layout, layout, sizeof h.layout - 1);
  h.columns = columns, h.depth = depth;
  return h;
}

// The panels in `packed`, once it is sure that they are what the kernel expects.
inline const uint8_t* packed_panels(const char* op, const TensorView& packed, const char* layout,
                                    int64_t columns, int64_t depth, int64_t bytes) {
  const PackedHeader expected = packed_header(layout, columns, depth);
  NC_CHECK(packed.dtype == DType::kUInt8 && packed.rank == 1 && is_contiguous(packed) &&
               packed.sizes[0] == static_cast<int64_t>(sizeof expected) + bytes &&
               !std::memcmp(packed.data, &expected, sizeof expected),
           op, "packed must be weights [", columns, ", ", depth, "] packed in this process as '",
           layout, "', got ", name(packed.dtype), " ", shape(packed));
  return static_cast<const uint8_t*>(packed.data) + sizeof expected;
}

}  // namespace narrowcast
