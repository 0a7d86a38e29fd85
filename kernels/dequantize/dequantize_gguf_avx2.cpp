#include "dequantize/dequantize_blocks.h"

NC_DEQUANTIZE_KERNELS(avx2)
