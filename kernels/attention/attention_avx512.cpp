#include "attention/attention_wide_avx512.h"

namespace narrowcast {

void attention_rows_avx512(const AttentionArgs& args, const AttentionItem& item, float* scratch) {
  attention_rows<Wide>(args, item, scratch);
}

}  // namespace narrowcast
