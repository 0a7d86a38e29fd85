#include "conv2d/conv2d_direct_avx512.h"
#include "conv2d/conv2d_rows.h"

namespace narrowcast {
extern const Conv2dKernel conv2d_avx512 = {&depthwise_any, &gather_any, &direct_row};
}
