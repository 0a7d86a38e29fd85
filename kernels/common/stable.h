// The only header that includes torch: the LibTorch Stable ABI, and the way from its tensors to a
// TensorView. In the CPU library its tensors are on the CPU, in the CUDA library on the current
// GPU.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"

namespace narrowcast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// View of a tensor given as argument `argument` of `op`. Refuses other devices and ranks over
// kMaxRank.
TensorView view(const Tensor& t, const char* op, const char* argument);
TensorView view(const std::optional<Tensor>& t, const char* op, const char* argument);
// The same wherever t is.
TensorView describe(const Tensor& t, const char* op, const char* argument);

ScalarType scalar_type(DType t);
DType dtype_of(ScalarType t);

// A new tensor, contiguous.
Tensor empty(const std::vector<int64_t>& sizes, DType dtype);
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     DType dtype);
Tensor empty_strided_on(int32_t device_type, int32_t device, const std::vector<int64_t>& sizes,
                        const std::vector<int64_t>& strides, DType dtype);
// A new tensor of logical shape [N, C, H, W] that lies in memory as NHWC.
Tensor empty_channels_last(const std::vector<int64_t>& nchw, DType dtype);
// t itself when its elements lie contiguously, else a contiguous copy.
Tensor as_contiguous(const Tensor& t);

}  // namespace narrowcast
