#include "attention/attention_wide_avx512.h"
#include "attention_decode/attention_decode_few.h"

namespace narrowcast {

void attention_decode_rows_avx512(const AttentionArgs& args, const AttentionItem& item,
                                  float* scratch) {
  decode_rows<Wide>(args, item, scratch);
}

}  // namespace narrowcast
