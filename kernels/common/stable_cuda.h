// Where CUDA ops stand: on the device of their first tensor, and on torch's current stream there.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "common/launch.h"
#include "common/stable.h"

namespace narrowcast {

// Makes the device of `t` current for as long as this lives.
class OnDeviceOf {
 public:
  OnDeviceOf(const Tensor& t, const char* op, const char* argument);
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

// t itself when it is contiguous and begins at an address that 16-byte loads take, else a copy.
Tensor as_aligned(const Tensor& t);

}  // namespace narrowcast
