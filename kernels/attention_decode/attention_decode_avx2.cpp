#include "attention/attention_wide_avx2.h"
#include "attention_decode/attention_decode_few.h"

namespace narrowcast {

void attention_decode_rows_avx2(const AttentionArgs& args, const AttentionItem& item,
                                float* scratch) {
  decode_rows<Wide>(args, item, scratch);
}

}  // namespace narrowcast
