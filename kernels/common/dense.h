// Tensors that fill their memory without a gap, which what goes value by value takes as they lie.
// Not for ISA files.
#pragma once
#include "common/tensor.h"

namespace narrowcast {

// In whatever order of dimensions (channels-last images).
inline bool is_dense(const TensorView& t) {
  int64_t span = 1;
  for (int d = 0; d < t.rank; ++d) {
    if (t.strides[d] < 0) return false;
    span += (t.sizes[d] - 1) * t.strides[d];
  }
  if (numel(t) == 0 || span != numel(t)) return numel(t) == 0;
  for (int a = 0; a < t.rank; ++a)  // a stride 0, or two dimensions over the same memory
    for (int b = 0; b < t.rank; ++b)
      if (t.sizes[a] > 1 &&
          (t.strides[a] == 0 || (a != b && t.sizes[b] > 1 && t.strides[a] == t.strides[b])))
        return false;
  return true;
}

inline bool same_dense_layout(const TensorView& a, const TensorView& b) {
  bool same = is_dense(a) && a.rank == b.rank;
  for (int d = 0; same && d < a.rank; ++d)
    same = a.sizes[d] == b.sizes[d] && (a.sizes[d] <= 1 || a.strides[d] == b.strides[d]);
  return same;
}

}  // namespace narrowcast
