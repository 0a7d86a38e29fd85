// Tensors seen as matrices: [..., K] -> M rows of K elements, a fixed distance apart. Not for ISA
// files.
#pragma once
#include <algorithm>

#include "common/check.h"
#include "common/tensor.h"

namespace narrowcast {

struct Rows {
  int64_t rows = 0, columns = 0, ld = 0;
};

// Whether the elements of a row lie side by side, however the rows themselves lie.
inline bool has_dense_rows(const TensorView& t) {
  return t.rank < 1 || numel(t) == 0 || size(t, -1) == 1 || stride(t, -1) == 1;
}

// Whether t is such a matrix where it lies: elements of a row adjacent, rows evenly spaced.
inline bool has_even_rows(const TensorView& t) {
  if (t.rank < 1) return false;
  if (numel(t) == 0) return true;
  if (!has_dense_rows(t)) return false;
  int64_t below = 0, ld = 0;  // rows counted so far from the back, and their distance
  for (int d = t.rank - 2; d >= 0; --d) {
    if (t.sizes[d] == 1) continue;
    if (below == 0)
      ld = t.strides[d], below = t.sizes[d];
    else if (t.strides[d] != ld * below)
      return false;
    else
      below *= t.sizes[d];
  }
  return ld >= 0;
}

inline Rows rows_of(const TensorView& t) {
  Rows r;
  r.columns = size(t, -1);
  r.rows = 1;
  r.ld = r.columns;
  for (int d = t.rank - 2; d >= 0; --d) {
    if (t.sizes[d] != 1 && r.rows == 1) r.ld = t.strides[d];
    r.rows *= t.sizes[d];
  }
  return r;
}

// Whether the bytes between the first and the last element of a and of b meet. Strides are not
// negative.
inline bool may_overlap(const TensorView& a, const TensorView& b) {
  if (!defined(a) || !defined(b) || numel(a) == 0 || numel(b) == 0) return false;
  const auto end = [](const TensorView& t) {
    int64_t last = 0;
    for (int d = 0; d < t.rank; ++d) last += (t.sizes[d] - 1) * t.strides[d];
    return static_cast<const char*>(t.data) + (last + 1) * element_size(t.dtype);
  };
  return static_cast<const char*>(a.data) < end(b) && static_cast<const char*>(b.data) < end(a);
}

}  // namespace narrowcast
