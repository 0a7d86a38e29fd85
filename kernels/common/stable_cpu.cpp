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

Tensor empty_channels_last(const std::vector<int64_t>& s, DType dtype) {
  const int64_t c = std::max<int64_t>(s[1], 1), h = std::max<int64_t>(s[2], 1),
                w = std::max<int64_t>(s[3], 1);
  return empty_strided(s, {h * w * c, 1, w * c, c}, dtype);
}

}  // namespace narrowcast
