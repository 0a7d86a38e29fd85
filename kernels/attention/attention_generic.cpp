#include "attention/attention_wide_generic.h"

namespace narrowcast {

void attention_rows_generic(const AttentionArgs& args, const AttentionItem& item, float* scratch) {
  attention_rows<Wide>(args, item, scratch);
}

}  // namespace narrowcast
