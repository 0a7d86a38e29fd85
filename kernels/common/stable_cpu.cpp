// The part of stable.h that knows where tensors are: on the CPU.
#include "common/stable.h"

#include "common/image.h"

namespace narrowcast {

TensorView view(const Tensor& t, const char* op, const char* argument) {
  NC_CHECK(t.is_cpu(), op, argument, " must be on the CPU like the op's other tensors");
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

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     DType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type(dtype))),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_channels_last(const std::vector<int64_t>& s, DType dtype) {
  const int64_t c = std::max<int64_t>(s[1], 1), h = std::max<int64_t>(s[2], 1),
                w = std::max<int64_t>(s[3], 1);
  return empty_strided(s, {h * w * c, 1, w * c, c}, dtype);
}

Tensor as_channels_last(const Tensor& t) {
  const TensorView v = view(t, "image", "x");
  if (v.rank != 4 || is_channels_last(v)) return t;
  Tensor copy = empty_channels_last(std::vector<int64_t>(v.sizes, v.sizes + 4), v.dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace narrowcast
