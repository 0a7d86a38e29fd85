// The part of stable.h that is the same wherever tensors are; in both libraries.
#include "common/stable.h"

namespace narrowcast {

DType dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

ScalarType scalar_type(DType t) {
  switch (t) {
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kInt8:
      return ScalarType::Char;
    case DType::kUInt8:
      return ScalarType::Byte;
    case DType::kInt32:
      return ScalarType::Int;
    case DType::kInt64:
      return ScalarType::Long;
    default:
      return ScalarType::Bool;
  }
}

TensorView view(const std::optional<Tensor>& t, const char* op, const char* argument) {
  return t ? view(*t, op, argument) : TensorView{};
}

Tensor empty(const std::vector<int64_t>& sizes, DType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, strides, dtype);
}

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace narrowcast
