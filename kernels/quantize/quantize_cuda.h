// The CUDA side of quantize: the contract of quantize.h with pointers into device memory.
#pragma once
#include "common/launch.h"
#include "quantize/quantize.h"

namespace narrowcast {

// What quantisers found in device memory, added up: findings[0] NaNs, findings[1] values not
// finite.
void quantize_rows_sm80(const QuantizeRowsArgs& args, int64_t* findings, Stream stream);
void quantize_static_sm80(const QuantizeStaticArgs& args, int64_t* findings, Stream stream);

}  // namespace narrowcast
