#include "gated_act/gated_act_loop.h"

NC_GATED_ACT_KERNEL(avx512)
