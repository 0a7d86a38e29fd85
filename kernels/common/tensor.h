// Questions about a TensorView. Not for ISA files: these are inline functions.
#pragma once
#include <string>
#include <vector>

#include "common/tensor_view.h"

namespace narrowcast {

inline bool defined(const TensorView& t) { return t.rank >= 0; }

inline int64_t numel(const TensorView& t) {
  int64_t n = 1;
  for (int d = 0; d < t.rank; ++d) n *= t.sizes[d];
  return n;
}

// Size and stride of dimension d; negative d counts from the back.
inline int64_t size(const TensorView& t, int d) { return t.sizes[d < 0 ? t.rank + d : d]; }
inline int64_t stride(const TensorView& t, int d) { return t.strides[d < 0 ? t.rank + d : d]; }

inline bool is_contiguous(const TensorView& t) {
  if (numel(t) == 0) return true;  // whatever its strides say
  int64_t expected = 1;
  for (int d = t.rank - 1; d >= 0; --d) {
    if (t.sizes[d] == 0) return true;
    if (t.sizes[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

inline bool is_floating(DType t) {
  return t == DType::kFloat32 || t == DType::kFloat16 || t == DType::kBFloat16;
}

inline int64_t element_size(DType t) {
  switch (t) {
    case DType::kInt8:
    case DType::kUInt8:
    case DType::kBool:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    default:
      return 8;
  }
}

inline const char* name(DType t) {
  constexpr const char* names[] = {
      "float32", "float16", "bfloat16", "float64", "int8",
      "uint8",   "int32",   "int64",    "bool",    "an unsupported dtype"};
  return names[static_cast<int>(t)];
}

// "[2, 3]", for error messages.
inline std::string shape(const TensorView& t) {
  std::string s = "[";
  for (int d = 0; d < t.rank; ++d) s += (d ? ", " : "") + std::to_string(t.sizes[d]);
  return s + "]";
}

}  // namespace narrowcast
