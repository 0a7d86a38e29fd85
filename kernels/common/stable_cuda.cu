// The part of stable.h that knows where tensors are: on the current GPU.
#include "common/stable_cuda.h"

namespace narrowcast {
namespace {
int32_t device_of(const Tensor& t, const char* op, const char* argument) {
  NC_CHECK(t.is_cuda(), op, argument, " must be on a GPU like the op's other tensors");
  return t.get_device_index();
}
}  // namespace

OnDeviceOf::OnDeviceOf(const Tensor& t, const char* op, const char* argument)
    : guard_(device_of(t, op, argument)) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
}

TensorView view(const Tensor& t, const char* op, const char* argument) {
  const int32_t device = device_of(t, op, argument),
                current = torch::stable::accelerator::getCurrentDeviceIndex();
  NC_CHECK(device == current, op, argument, " must be on GPU ", current,
           " like the op's first tensor, got GPU ", device);
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
      aoti_torch_device_type_cuda(), torch::stable::accelerator::getCurrentDeviceIndex(), &handle));
  return Tensor(handle);
}

}  // namespace narrowcast
