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
  return describe(t, op, argument);
}

Tensor as_aligned(const Tensor& t) {
  const Tensor dense = as_contiguous(t);
  const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0;
  return aligned ? dense : torch::stable::clone(dense);
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     DType dtype) {
  return empty_strided_on(aoti_torch_device_type_cuda(),
                          torch::stable::accelerator::getCurrentDeviceIndex(), sizes, strides,
                          dtype);
}

}  // namespace narrowcast
