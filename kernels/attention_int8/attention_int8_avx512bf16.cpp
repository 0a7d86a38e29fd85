#include "attention/attention_wide_avx512bf16.h"
#include "attention_int8/attention_int8_vnni.h"

namespace narrowcast {
namespace {

// Values in bfloat16 are weighed as such; others as float32, by the kernel of AVX-512.
void rows(const AttentionInt8Args& args, const AttentionItem& item, float* scratch) {
  if (args.attention.kv_dtype != DType::kBFloat16)
    return attention_int8_avx512.rows(args, item, scratch);
  attention_int8_rows<Vnni<WidePairs>>(args, item, scratch);
}

}  // namespace

const AttentionInt8Kernel attention_int8_avx512bf16 = {quantize_keys<Wide>, rows};

}  // namespace narrowcast
