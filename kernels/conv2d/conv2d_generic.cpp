#include "conv2d/conv2d_rows.h"

namespace narrowcast {
extern const Conv2dKernel conv2d_generic = {&depthwise_any, &gather_any};
}
