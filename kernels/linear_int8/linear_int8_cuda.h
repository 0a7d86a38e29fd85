// The CUDA side of linear_int8: the contract of linear_int8.h with pointers into device memory.
// Ignored: packed, kernel, scratch, start, piece, pieces.
#pragma once
#include "common/launch.h"
#include "linear_int8/linear_int8.h"

namespace narrowcast {

// Any rows, columns, depth >= 1, any alignment. 16-byte aligned rows of x and w are fastest.
void linear_int8_sm80(const LinearInt8Args& args, Stream stream);

}  // namespace narrowcast
