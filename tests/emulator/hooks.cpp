// What g++ -fsanitize=thread calls at every load and store of the code it compiles. The library of
// ThreadSanitizer is not linked: these are the functions.
#include "emulator/memory.h"

using emulator::Access;
using emulator::access;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define HOOKS(n)                                                            \
  void __tsan_read##n(void* p) { access(p, n, Access::kRead); }             \
  void __tsan_write##n(void* p) { access(p, n, Access::kWrite); }           \
  void __tsan_unaligned_read##n(void* p) { access(p, n, Access::kRead); }   \
  void __tsan_unaligned_write##n(void* p) { access(p, n, Access::kWrite); } \
  void __tsan_volatile_read##n(void* p) { access(p, n, Access::kRead); }    \
  void __tsan_volatile_write##n(void* p) { access(p, n, Access::kWrite); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS
void __tsan_read_range(void* p, unsigned long bytes) { access(p, bytes, Access::kRead); }
void __tsan_write_range(void* p, unsigned long bytes) { access(p, bytes, Access::kWrite); }
}
