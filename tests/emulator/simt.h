// A CUDA grid on one CPU thread. Every CUDA thread is a fiber; fibers switch only at barriers, at
// warp collectives and at their end. The seed chooses the order of blocks and threads, and whether
// an asynchronous copy lands when it is issued or when it is waited for. Memory is watched by
// memory.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

using Site = std::source_location;

// What a kernel did wrong: `kind` is one of "race", "uninitialised read", "out of bounds",
// "copy in flight", "misaligned", "divergence", "deadlock", "write to constant memory", "launch".
struct Error : std::runtime_error {
  std::string kind;
  Error(std::string kind, const std::string& text)
      : std::runtime_error(kind + ": " + text), kind(std::move(kind)) {}
};

struct Copy {
  void* to;
  const void* from;
  int bytes;  // the rest of the 16 are zeros
  bool landed;
};

struct Thread {
  int id = 0, warp = 0;
  dim3 index;
  bool done = false, waiting = false;
  const char* waits_for = "";  // for reports
  Site site;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                 // not yet committed
};

void set_seed(uint64_t seed);
uint32_t random_number();

// Runs the grid; throws Error at the first mistake.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// The most shared memory that a launch of this process asked for.
size_t most_shared_bytes();

// For the instructions. All are called on a fiber.
Thread& self();
dim3 block_index();
dim3 block_size();
void* shared_bytes(size_t needed);
[[noreturn]] void mistake(const char* kind, const std::string& text);
// Every lane of the warp brings its data; the last one to come runs `compute` over all of them.
void collective(const char* name, Site site, void* data, void (*compute)(void* const (&lanes)[32]));
void block_barrier(Site site);
void warp_barrier(Site site);

// Who runs now, in the terms of the race detector.
struct Now {
  uint32_t launch_first_block, block;  // blocks are numbered through all launches
  uint32_t interval, warp_interval;    // barriers passed
  int thread, warp;
};
bool on_fiber();
Now now();

}  // namespace emulator
