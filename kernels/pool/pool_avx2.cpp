#include "pool/pool_rows.h"

NC_POOL_KERNEL(avx2)
