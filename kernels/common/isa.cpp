#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/check.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace narrowcast {
namespace {

uint32_t detect() {
  uint32_t have = kGeneric;
#if defined(__x86_64__) && !defined(NARROWCAST_PORTABLE)
  const auto has = [](bool x) { return x; };
  if (has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma"))) have |= kAvx2;
  if ((have & kAvx2) && has(__builtin_cpu_supports("avx512f")) &&
      has(__builtin_cpu_supports("avx512bw")) && has(__builtin_cpu_supports("avx512vl")) &&
      has(__builtin_cpu_supports("avx512dq")) && has(__builtin_cpu_supports("avx512vnni")))
    have |= kAvx512;
  if ((have & kAvx512) && has(__builtin_cpu_supports("avx512bf16"))) have |= kAvx512Bf16;
  // Linux keeps the tile registers from a process until it asks for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if ((have & kAvx512Bf16) && has(__builtin_cpu_supports("amx-int8")) &&
      has(__builtin_cpu_supports("amx-bf16")) &&
      syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0)
    have |= kAmx;
#endif
  return have;
}

uint32_t allowed_by(const char* name) {
  if (!std::strcmp(name, "generic")) return kGeneric;
  if (!std::strcmp(name, "avx2")) return kAvx2;
  if (!std::strcmp(name, "avx512")) return kAvx2 | kAvx512 | kAvx512Bf16;
  if (!std::strcmp(name, "amx")) return kAvx2 | kAvx512 | kAvx512Bf16 | kAmx;
  fail("NARROWCAST_ISA", "must be generic, avx2, avx512 or amx, got '", name, "'");
}

uint32_t machine_isa() {
  static const uint32_t isa = [] {
    const char* cap = std::getenv("NARROWCAST_ISA");
    return cap && *cap ? detect() & allowed_by(cap) : detect();
  }();
  return isa;
}

std::atomic<uint32_t> g_cap{~0u};

}  // namespace

uint32_t cpu_isa() { return machine_isa() & g_cap.load(std::memory_order_relaxed); }

void cap_isa(const char* name) { g_cap = *name ? allowed_by(name) : ~0u; }

const char* isa_name() {
  const uint32_t isa = cpu_isa();
  return isa & kAmx ? "amx" : isa & kAvx512 ? "avx512" : isa & kAvx2 ? "avx2" : "generic";
}

}  // namespace narrowcast
