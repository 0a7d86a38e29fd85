// The memory kernels may touch, and a record of every byte of it: allocated or red zone, written or
// not, being filled by an asynchronous copy, who touched it last. Plain loads and stores arrive
// through the hooks that -fsanitize=thread makes the compiler insert (hooks.cpp); instructions of
// ptx_host.h call access() themselves.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

namespace emulator {

enum class Access { kRead, kWrite, kAtomic };

// Checks an access by the running thread; addresses outside of the arena (stacks, constants) pass.
void access(const void* p, size_t bytes, Access kind);
// The same for an instruction that needs an aligned address inside the arena.
void access_aligned(const void* p, size_t bytes, size_t alignment, Access kind, const char* what);

// The life of an asynchronous copy's destination.
void copy_begins(const void* to, size_t bytes);
void copy_ends(const void* to, size_t bytes);

// Memory surrounded by red zones, of unpredictable content; `mark_written` makes it readable.
void* allocate(size_t bytes);
void mark_written(const void* p, size_t bytes);
void mark_unwritten(void* p, size_t bytes);  // and fills it with poison
void mark_constant(const void* p, size_t bytes);
bool is_written(const void* p);
void release_all();

// An array in the arena. From values: an input, which kernels may read only. By count: an output.
template <class T>
struct Buffer {
  T* data;
  size_t count;
  explicit Buffer(size_t count)
      : data(static_cast<T*>(allocate(count * sizeof(T)))), count(count) {}
  // `offset`: elements between a 128-byte boundary and the first one, to test unaligned bases.
  explicit Buffer(const std::vector<T>& values, size_t offset = 0) : count(values.size()) {
    T* base = static_cast<T*>(allocate((count + offset) * sizeof(T)));
    data = base + offset;
    for (size_t i = 0; i < count; ++i) data[i] = values[i];
    mark_written(data, count * sizeof(T));
    mark_constant(data, count * sizeof(T));
  }
  T& operator[](size_t i) const { return data[i]; }
};

}  // namespace emulator
