// What a kernel room sees of a tensor: no torch type passes this header.
#pragma once
#include <cstdint>

namespace narrowcast {

enum class DType : int8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat64,
  kInt8,
  kUInt8,
  kInt32,
  kInt64,
  kBool,
  kOther
};

constexpr int kMaxRank = 8;

// Sizes and strides in elements. An argument that was not given has rank -1.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kOther;
  int rank = -1;
  int64_t sizes[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};
};

}  // namespace narrowcast
