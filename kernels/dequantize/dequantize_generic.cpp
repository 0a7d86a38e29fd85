#include "dequantize/dequantize.h"

namespace narrowcast {

void dequantize_group_generic(const uint8_t* packed, int bits, float scale, float offset,
                              float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int code = bits == 8 ? static_cast<int8_t>(packed[i])
                     : (i & 1) ? packed[i / 2] >> 4
                               : packed[i / 2] & 15;
    out[i] = static_cast<float>(code) * scale + offset;
  }
}

}  // namespace narrowcast
