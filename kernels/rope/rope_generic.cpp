#include "rope/rope_rows.h"

NC_ROPE_KERNEL(generic)
