#include "attention/attention_wide_generic.h"
#include "attention_decode/attention_decode_few.h"

namespace narrowcast {

void attention_decode_rows_generic(const AttentionArgs& args, const AttentionItem& item,
                                   float* scratch) {
  decode_rows<Wide>(args, item, scratch);
}

}  // namespace narrowcast
