// The CUDA side of the norms: the contract of norm.h with pointers into device memory.
#pragma once
#include "common/launch.h"
#include "norm/norm.h"

namespace narrowcast {

// findings, when args.q: [0] NaNs and [1] values not finite that were quantised, added up.
void norm_sm80(const NormArgs& args, int64_t* findings, Stream stream);

}  // namespace narrowcast
