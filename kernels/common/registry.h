// The kernels of an op, best first, made from its .inc list, and the choice among them.
// Every kernel in a list can be enumerated and forced by name, which is how the tests reach it.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "common/isa.h"

namespace narrowcast {

template <class Fn>
struct Variant {
  const char* name;
  uint32_t isa;
  Fn fn;
};

// One per list. Registers itself so that op_variants() and force_variant() find it by name.
class VariantList {
 public:
  using NameAt = const char* (*)(int);
  using IsaAt = uint32_t (*)(int);
  VariantList(const char* op, int count, NameAt name_at, IsaAt isa_at);
  int select() const;  // index of the forced variant, else of the first that this CPU can run

  const char* op;
  int count;
  NameAt name_at;
  IsaAt isa_at;
  mutable std::atomic<int> forced{-1};
  VariantList* next;
};

// "avx512,avx2,generic": the variants of op that this CPU can run, best first.
const char* op_variants(const char* op);
// Makes op run this variant only; "" gives the choice back. For tests and benchmarks.
void force_variant(const char* op, const char* variant);

}  // namespace narrowcast

// Defines `select_<op>()`, the kernel of <op> to call now, from the array `variants` of the list.
#define NC_VARIANT_LIST(op, Fn, variants)                                                  \
  static const ::narrowcast::VariantList op##_list(                                        \
      #op, sizeof(variants) / sizeof(variants[0]), [](int i) { return variants[i].name; }, \
      [](int i) { return variants[i].isa; });                                              \
  static Fn select_##op() { return variants[op##_list.select()].fn; }
