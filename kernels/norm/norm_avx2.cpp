#include "norm/norm_rows.h"

NC_NORM_KERNEL(avx2)
