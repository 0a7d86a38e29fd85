// The epilogue's activations, in scalar form. Vector forms live in vec_*.h and follow these
// formulas.
#pragma once
#include <cstdint>

namespace narrowcast {

enum class Activation : int32_t { kNone, kRelu, kRelu6, kHardswish, kSilu, kGelu, kGeluTanh };

// Throws "<op>: <argument> must be none, relu, ..., got '...'" for an unknown name.
Activation parse_activation(const char* name, const char* op, const char* argument);

float activate(Activation activation, float x);

}  // namespace narrowcast
