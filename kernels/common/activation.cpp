#include "common/activation.h"

#include <cmath>
#include <cstring>

#include "common/check.h"

namespace narrowcast {

Activation parse_activation(const char* name, const char* op, const char* argument) {
  constexpr const char* names[] = {"none", "relu", "relu6",    "hardswish",
                                   "silu", "gelu", "gelu_tanh"};
  for (int i = 0; i < 7; ++i)
    if (!std::strcmp(name, names[i])) return static_cast<Activation>(i);
  fail(op, argument, " must be none, relu, relu6, hardswish, silu, gelu or gelu_tanh, got '", name,
       "'");
}

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0 ? 0.0f : x;  // NaN stays NaN
    case Activation::kRelu6:
      return x < 0 ? 0.0f : x > 6 ? 6.0f : x;
    case Activation::kHardswish: {
      const float gate = x + 3 < 0 ? 0.0f : x + 3 > 6 ? 6.0f : x + 3;
      return x * gate * (1.0f / 6.0f);
    }
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
  return x;
}

}  // namespace narrowcast
