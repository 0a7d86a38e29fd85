#include "emulator/memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/simt.h"

namespace emulator {
namespace {

constexpr size_t kArena = 64 << 20, kRedZone = 256, kAlignment = 128;

// Who touched a byte. Only barriers order accesses: a barrier of the block ends an interval for
// all, a barrier of the warp for its lanes.
enum class Who : uint8_t { kOne, kWarp, kBlock, kGrid };
struct Touch {
  uint32_t block = 0, interval = 0, warp_interval = 0;  // block 0: never
  uint16_t thread = 0;
  Who who = Who::kOne;
};
struct Byte {
  Touch write, read;
  bool allocated = false, written = false, in_flight = false, constant = false;
};
Byte fresh() {
  Byte b;
  b.allocated = true;
  return b;
}

template <class T>
T* reserve(size_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<T*>(p);
}

unsigned char* const arena = reserve<unsigned char>(kArena);
Byte* const record = reserve<Byte>(kArena);
size_t used = 0;

bool inside(const void* p) { return p >= arena && p < arena + kArena; }
size_t at(const void* p) { return static_cast<const unsigned char*>(p) - arena; }

// Whether the touch is not ordered before what `n` does now.
bool unordered(const Touch& t, const Now& n) {
  if (t.block < n.launch_first_block) return false;
  if (t.block != n.block || t.who == Who::kGrid) return true;
  if (t.interval < n.interval) return false;
  if (t.who == Who::kBlock) return true;
  if (t.who == Who::kOne && t.thread == n.thread) return false;
  return t.thread / 32 != n.warp || t.warp_interval >= n.warp_interval;
}

Touch touched_by(const Now& n) {
  return {n.block, n.interval, n.warp_interval, static_cast<uint16_t>(n.thread), Who::kOne};
}

// A second reader in the same interval: remember that there was more than one.
Touch also_read_by(const Touch& t, const Now& n) {
  if (!unordered(t, n)) return touched_by(n);
  Touch merged = t;
  if (t.block != n.block || t.who == Who::kGrid)
    merged = touched_by(n), merged.who = Who::kGrid;
  else if (t.who == Who::kBlock || t.thread / 32 != n.warp)
    merged.who = Who::kBlock;
  else
    merged.who = Who::kWarp, merged.warp_interval = n.warp_interval;
  return merged;
}

std::string place(const void* p) {
  char text[64];
  std::snprintf(text, sizeof text, " at arena + %#zx", at(p));
  return text;
}

std::string told(const Touch& t, const Now& n) {
  if (t.block != n.block) return "another block";
  return t.who == Who::kOne ? "thread " + std::to_string(t.thread) : "several threads";
}

void check(const unsigned char* p, Access kind, const Now& n) {
  Byte& b = record[at(p)];
  const bool writes = kind == Access::kWrite;
  const char* verb = writes ? "write" : kind == Access::kRead ? "read" : "atomic";
  if (!b.allocated) mistake("out of bounds", verb + place(p));
  if (b.in_flight) mistake("copy in flight", verb + place(p));
  if (!writes && !b.written) mistake("uninitialised read", verb + place(p));
  if (kind == Access::kAtomic) return;  // atomics do not race with each other
  if (writes && b.constant) mistake("write to constant memory", verb + place(p));
  if (unordered(b.write, n))
    mistake("race", verb + place(p) + " meets a write by " + told(b.write, n));
  if (writes && unordered(b.read, n))
    mistake("race", verb + place(p) + " meets a read by " + told(b.read, n));
  if (writes)
    b.write = touched_by(n), b.written = true;
  else
    b.read = also_read_by(b.read, n);
}

}  // namespace

void access(const void* p, size_t bytes, Access kind) {
  if (!inside(p) || !on_fiber()) return;
  const Now n = now();
  for (size_t i = 0; i < bytes; ++i) check(static_cast<const unsigned char*>(p) + i, kind, n);
}

void access_aligned(const void* p, size_t bytes, size_t alignment, Access kind, const char* what) {
  if (!inside(p)) mistake("out of bounds", std::string(what) + " of an address outside of memory");
  if (reinterpret_cast<uintptr_t>(p) % alignment) mistake("misaligned", what + place(p));
  access(p, bytes, kind);
}

void copy_begins(const void* to, size_t bytes) {
  access(to, bytes, Access::kWrite);
  for (size_t i = 0; i < bytes; ++i) record[at(to) + i].in_flight = true;
}

void copy_ends(const void* to, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    Byte& b = record[at(to) + i];
    b.in_flight = false, b.written = true;
    b.write = touched_by(now());
  }
}

void* allocate(size_t bytes) {
  used = (used + kRedZone + kAlignment - 1) / kAlignment * kAlignment;
  if (used + bytes + kRedZone > kArena) throw Error("launch", "the arena is full");
  unsigned char* p = arena + used;
  mark_unwritten(p, bytes);
  used += bytes;
  return p;
}

void mark_written(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) record[at(p) + i].written = true;
}

void mark_unwritten(void* p, size_t bytes) {
  unsigned char* c = static_cast<unsigned char*>(p);
  for (size_t i = 0; i < bytes; ++i) {
    c[i] = static_cast<unsigned char>(0x5b + 37 * i);
    record[at(c) + i] = fresh();
  }
}

void mark_constant(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) record[at(p) + i].constant = true;
}

bool is_written(const void* p) { return record[at(p)].written; }

void release_all() {
  for (size_t i = 0; i < used + kRedZone && i < kArena; ++i) record[i] = Byte{};
  used = 0;
}

}  // namespace emulator
