// The machinery ops of the catalogue.
#include "common/isa.h"
#include "common/registry.h"
#include "common/stable.h"

namespace narrowcast {
namespace {
std::string variants_of(std::string op) { return op_variants(op.c_str()); }
void force(std::string op, std::string variant) { force_variant(op.c_str(), variant.c_str()); }
void cap(std::string isa) { cap_isa(isa.c_str()); }
std::string isa() { return isa_name(); }
}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CompositeExplicitAutograd, m) {
  m.impl("_op_variants", TORCH_BOX(&narrowcast::variants_of));
  m.impl("_force_variant", TORCH_BOX(&narrowcast::force));
  m.impl("_cap_isa", TORCH_BOX(&narrowcast::cap));
  m.impl("_isa", TORCH_BOX(&narrowcast::isa));
}
