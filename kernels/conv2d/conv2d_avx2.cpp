#include "conv2d/conv2d_rows.h"

NC_CONV2D_KERNEL(avx2)
