// Which instruction sets this CPU offers, minus what NARROWCAST_ISA forbids.
// Included by ISA files: constants and declarations only, no code.
#pragma once
#include <cstdint>

namespace narrowcast {

enum Isa : uint32_t {
  kGeneric = 0,
  kAvx2 = 1,        // AVX2, FMA, F16C
  kAvx512 = 2,      // F, BW, VL, DQ, VNNI
  kAvx512Bf16 = 4,  // AVX512_BF16
  kAmx = 8,         // tiles, INT8 and BF16
};

// Bits of the instruction sets that kernels may use now.
uint32_t cpu_isa();
// "generic", "avx2", "avx512" or "amx"; "" gives back what the machine and NARROWCAST_ISA allow.
void cap_isa(const char* name);
const char* isa_name();

}  // namespace narrowcast
