#include "common/step.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "common/check.h"

namespace narrowcast {
namespace {

std::map<std::string, StepFactory>& factories() {
  static std::map<std::string, StepFactory> all;
  return all;
}

std::atomic<int64_t> live_bytes{0};

template <class T>
T attribute(const StepSpec& spec, const char* name, T otherwise) {
  const auto found = spec.attributes.find(name);
  if (found == spec.attributes.end()) return otherwise;
  const T* value = std::get_if<T>(&found->second);
  NC_CHECK(value, spec.op.c_str(), name, " has the wrong type in this plan");
  return *value;
}

}  // namespace

int64_t StepSpec::integer(const char* name, int64_t otherwise) const {
  return attribute<int64_t>(*this, name, otherwise);
}
bool StepSpec::flag(const char* name, bool otherwise) const {
  return attribute<bool>(*this, name, otherwise);
}
std::string StepSpec::text(const char* name, const char* otherwise) const {
  return attribute<std::string>(*this, name, otherwise);
}
std::vector<int64_t> StepSpec::integers(const char* name) const {
  return attribute<std::vector<int64_t>>(*this, name, {});
}
double StepSpec::number(const char* name, double otherwise) const {
  const auto found = attributes.find(name);
  if (found != attributes.end())  // JSON and Python write 1.0 as 1
    if (const int64_t* whole = std::get_if<int64_t>(&found->second))
      return static_cast<double>(*whole);
  return attribute<double>(*this, name, otherwise);
}

RegisterStep::RegisterStep(const char* op, StepFactory factory) { factories()[op] = factory; }

StepFactory find_step(const std::string& op) {
  const auto found = factories().find(op);
  return found == factories().end() ? nullptr : found->second;
}

std::shared_ptr<void> aligned_buffer(int64_t bytes) {
  constexpr size_t kAlign = 64;
  const size_t size = (std::max<int64_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign;
  void* p = std::aligned_alloc(kAlign, size);
  if (!p) throw std::bad_alloc();
  live_bytes += static_cast<int64_t>(size);
  return std::shared_ptr<void>(p, [size](void* buffer) {
    live_bytes -= static_cast<int64_t>(size);
    std::free(buffer);
  });
}

int64_t aligned_bytes() { return live_bytes; }

}  // namespace narrowcast
