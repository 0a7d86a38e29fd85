#include "attention_int8/attention_int8_vnni.h"

namespace narrowcast {

const AttentionInt8Kernel attention_int8_avx512 = {quantize_keys<Wide>,
                                                   attention_int8_rows<Vnni<Wide>>};

}  // namespace narrowcast
