#include "attention_int8/attention_int8_tile.h"

#include "attention/attention_wide_generic.h"

namespace narrowcast {
namespace {

struct Int8 : Wide {
  static constexpr uint32_t kFlip = 0;
  static void int8_scores(const uint8_t* q, const int8_t* k, int64_t depth, int64_t keys,
                          int64_t lanes, const float* scales, const int32_t*, const float* factor,
                          const float* offset, float* scores) {
    for (int64_t j = 0; j < keys; ++j) {
      int32_t acc[kAttentionRows] = {};
      for (int64_t d = 0; d < depth; d += 4)
        for (int64_t r = 0; r < lanes; ++r) {
          const int8_t* x = reinterpret_cast<const int8_t*>(q) + d * kAttentionRows + r * 4;
          const int8_t* y = k + j * depth + d;
          acc[r] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
        }
      for (int64_t r = 0; r < lanes; ++r)
        scores[j * kAttentionRows + r] =
            static_cast<float>(acc[r]) * scales[j] * factor[r] + offset[r];
    }
  }
};

}  // namespace

const AttentionInt8Kernel attention_int8_generic = {quantize_keys<Int8>, attention_int8_rows<Int8>};

}  // namespace narrowcast
