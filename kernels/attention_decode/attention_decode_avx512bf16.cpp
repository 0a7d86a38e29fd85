#include "attention_decode/attention_decode.h"

namespace narrowcast {

// Many rows of bfloat16 against a plain cache of it, as in a prefill: products of pairs, as
// attention has them. Few rows wait for the memory, not for products.
void attention_decode_rows_avx512bf16(const AttentionArgs& args, const AttentionItem& item,
                                      float* scratch) {
  const bool pairs = args.q_dtype == DType::kBFloat16 && args.kv_dtype == DType::kBFloat16;
  if (pairs && !args.block_table && item.rows > kDecodeRows)
    return attention_rows_avx512bf16(args, item, scratch);
  attention_decode_rows_avx512(args, item, scratch);
}

}  // namespace narrowcast
