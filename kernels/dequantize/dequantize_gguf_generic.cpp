#include "dequantize/dequantize_blocks.h"

NC_DEQUANTIZE_KERNELS(generic)
