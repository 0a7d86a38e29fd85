#include "attention/attention_wide_avx2.h"

namespace narrowcast {

void attention_rows_avx2(const AttentionArgs& args, const AttentionItem& item, float* scratch) {
  attention_rows<Wide>(args, item, scratch);
}

}  // namespace narrowcast
