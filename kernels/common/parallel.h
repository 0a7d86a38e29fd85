// The one thread pool: torch's (parallel_cpu.cpp), or std::thread where torch is absent
// (parallel_std.cpp).
#pragma once
#include <cstdint>
#include <type_traits>

namespace narrowcast {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on disjoint ranges that cover [begin, end), each at least `grain` long where possible.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context);
int thread_count();

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  if (begin >= end) return;
  if (end - begin <= grain) return f(begin, end);
  using Body = std::remove_reference_t<F>;
  parallel_ranges(
      begin, end, grain,
      [](void* context, int64_t b, int64_t e) { (*static_cast<Body*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace narrowcast
