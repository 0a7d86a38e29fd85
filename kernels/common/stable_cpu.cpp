// The part of stable.h that knows where tensors are: on the CPU.
#include "common/stable.h"

namespace narrowcast {

TensorView view(const Tensor& t, const char* op, const char* argument) {
  NC_CHECK(t.is_cpu(), op, argument, " must be on the CPU like the op's other tensors");
  return describe(t, op, argument);
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     DType dtype) {
  return empty_strided_on(aoti_torch_device_type_cpu(), 0, sizes, strides, dtype);
}

}  // namespace narrowcast
