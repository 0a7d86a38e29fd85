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

TensorView describe(const Tensor& t, const char* op, const char* argument) {
  TensorView v;
  v.rank = static_cast<int>(t.dim());
  NC_CHECK(v.rank <= kMaxRank, op, argument, " must have at most ", kMaxRank, " dimensions, got ",
           v.rank);
  v.dtype = dtype_of(t.scalar_type());
  v.data = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  const auto sizes = t.sizes(), strides = t.strides();
  for (int d = 0; d < v.rank; ++d) v.sizes[d] = sizes[d], v.strides[d] = strides[d];
  return v;
}

Tensor empty_strided_on(int32_t device_type, int32_t device, const std::vector<int64_t>& sizes,
                        const std::vector<int64_t>& strides, DType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type(dtype))),
      device_type, device, &handle));
  return Tensor(handle);
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

Tensor empty_channels_last(const std::vector<int64_t>& s, DType dtype) {
  const int64_t c = std::max<int64_t>(s[1], 1), h = std::max<int64_t>(s[2], 1),
                w = std::max<int64_t>(s[3], 1);
  return empty_strided(s, {h * w * c, 1, w * c, c}, dtype);
}

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace narrowcast
