// The CUDA side of linear_grouped: the contract of linear_grouped.h for activation_bits 16, with
// pointers into device memory. x and the codes are 16-byte aligned. Of the weights only `source` is
// read; of the layout n, k, group, bits, half.
#pragma once
#include "common/launch.h"
#include "linear_grouped/linear_grouped.h"

namespace narrowcast {

// float32 values that linear_grouped_sm80 needs at `partials`: 0 where K is not split.
int64_t linear_grouped_sm80_partials(const LinearGroupedArgs& args);
void linear_grouped_sm80(const LinearGroupedArgs& args, float* partials, Stream stream);

}  // namespace narrowcast
