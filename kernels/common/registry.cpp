#include "common/registry.h"

#include <mutex>
#include <string>

namespace narrowcast {
namespace {

VariantList*& head() {
  static VariantList* first = nullptr;
  return first;
}

const VariantList& find(const char* op) {
  for (const VariantList* list = head(); list; list = list->next)
    if (!std::strcmp(list->op, op)) return *list;
  fail("variants", "no kernel list is named '", op, "'");
}

}  // namespace

VariantList::VariantList(const char* op, int count, NameAt name_at, IsaAt isa_at)
    : op(op), count(count), name_at(name_at), isa_at(isa_at), next(head()) {
  head() = this;
}

int VariantList::select() const {
  const int wanted = forced.load(std::memory_order_relaxed);
  if (wanted >= 0) return wanted;
  const uint32_t have = cpu_isa();
  for (int i = 0; i < count; ++i)
    if ((isa_at(i) & ~have) == 0) return i;
  fail(op, "no kernel runs on this CPU");
}

const char* op_variants(const char* op) {
  const VariantList& list = find(op);
  thread_local std::string names;
  names.clear();
  const uint32_t have = cpu_isa();
  for (int i = 0; i < list.count; ++i)
    if ((list.isa_at(i) & ~have) == 0) {
      if (!names.empty()) names += ',';
      names += list.name_at(i);
    }
  return names.c_str();
}

void force_variant(const char* op, const char* variant) {
  const VariantList& list = find(op);
  if (!*variant) {
    list.forced = -1;
    return;
  }
  for (int i = 0; i < list.count; ++i)
    if (!std::strcmp(list.name_at(i), variant)) {
      NC_CHECK((list.isa_at(i) & ~cpu_isa()) == 0, op, "variant '", variant,
               "' does not run on this CPU");
      list.forced = i;
      return;
    }
  fail(op, "variant must be one of ", op_variants(op), ", got '", variant, "'");
}

}  // namespace narrowcast
