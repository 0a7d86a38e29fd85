#include "emulator/simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>

#include "emulator/memory.h"

namespace emulator {
namespace {

constexpr size_t kStack = 128 * 1024;

struct Warp {
  int lanes = 0, arrived = 0;
  const char* name = nullptr;
  Site site;
  void* data[32] = {};
  uint32_t interval = 0;
};

struct Fiber : Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Grid {
  dim3 size, block, index;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> ready;  // in the order they became so
  Fiber* current = nullptr;
  ucontext_t scheduler;
  int alive = 0, at_barrier = 0;
  Site barrier_site;
  uint32_t interval = 0, first_block = 0;
  char* shared = nullptr;
  size_t shared_size = 0;
  std::unique_ptr<Error> error;
};

Grid* grid = nullptr;
uint32_t blocks_run = 0;  // of all launches
size_t most_shared = 0;
uint64_t random_state = 1;
enum class Order { kForward, kBackward, kShuffled, kWarpByWarp };
Order order = Order::kForward;

void leave() { swapcontext(&grid->current->context, &grid->scheduler); }

void make_ready(Fiber& f) {
  f.waiting = false;
  grid->ready.push_back(&f);
}

void wait(const char* name, Site site) {
  Fiber& me = *grid->current;
  me.waiting = true, me.waits_for = name, me.site = site;
  leave();
}

std::string where(Site s) {
  const char* slash = std::strrchr(s.file_name(), '/');
  return std::string(slash ? slash + 1 : s.file_name()) + ":" + std::to_string(s.line());
}

std::string block_name() {
  return "block (" + std::to_string(grid->index.x) + ", " + std::to_string(grid->index.y) + ")";
}

void release_barrier() {
  grid->at_barrier = 0;
  ++grid->interval;
  for (Fiber& f : grid->fibers)
    if (f.waiting && !std::strcmp(f.waits_for, "sync_threads")) make_ready(f);
}

void finish_thread() {
  Fiber& me = *grid->current;
  const auto real = [](const std::vector<Copy>& group) { return !group.empty(); };
  if (real(me.open) || std::any_of(me.groups.begin(), me.groups.end(), real))
    mistake("copy in flight", "the thread ends before its copies have landed");
  me.done = true;
  --grid->alive;
  if (grid->alive && grid->at_barrier == grid->alive) release_barrier();
}

void run_fiber() {
  (*grid->body)();
  finish_thread();
  leave();
}

Fiber* next() {
  std::vector<Fiber*>& ready = grid->ready;
  if (ready.empty()) return nullptr;
  size_t i = 0;
  if (order == Order::kBackward) i = ready.size() - 1;
  if (order == Order::kShuffled) i = random_number() % ready.size();
  if (order == Order::kWarpByWarp) {  // one warp runs as far ahead of the others as it can
    const int warp = grid->current ? grid->current->warp : -1;
    const auto same = [&](const Fiber* f) { return f->warp == warp; };
    const auto found = std::find_if(ready.begin(), ready.end(), same);
    i = found != ready.end() ? found - ready.begin() : random_number() % ready.size();
  }
  Fiber* f = ready[i];
  ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(i));
  return f;
}

[[noreturn]] void report_deadlock() {
  std::string text = block_name() + ", no thread can go on;";
  int shown = 0;
  for (const Fiber& f : grid->fibers) {
    if (f.done || shown == 6) continue;
    text += " thread " + std::to_string(f.id) + " waits for " + f.waits_for + " at " +
            where(f.site) + ";";
    ++shown;
  }
  throw Error("deadlock", text + " " + std::to_string(grid->alive) + " threads wait");
}

void run_block() {
  Grid& g = *grid;
  ++blocks_run;
  mark_unwritten(g.shared, g.shared_size);
  g.alive = static_cast<int>(g.fibers.size());
  g.at_barrier = 0, g.interval = 0, g.current = nullptr;
  g.ready.clear();
  std::fill(g.warps.begin(), g.warps.end(), Warp{});
  for (Fiber& f : g.fibers) {
    f.done = false, f.waiting = false;
    f.groups.clear(), f.open.clear();
    ++g.warps[f.warp].lanes;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
    make_ready(f);
  }
  while (g.alive) {
    Fiber* f = next();
    if (!f) report_deadlock();
    g.current = f;
    swapcontext(&g.scheduler, &f->context);
    if (g.error) throw *g.error;
  }
}

}  // namespace

void set_seed(uint64_t seed) {
  random_state = seed * 0x9e3779b97f4a7c15ull + 1;
  order = static_cast<Order>(seed % 4);
}

uint32_t random_number() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(random_state >> 33);
}

void launch(dim3 size, dim3 block, size_t shared_size, const std::function<void()>& body) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || size.x == 0 || size.x > 0x7fffffffu || size.y == 0 ||
      size.y > 65535 || size.z == 0 || size.z > 65535)
    throw Error("launch", "a grid or block that no GPU accepts");
  if (shared_size > 99 * 1024) throw Error("launch", "more shared memory than sm_86 has: 99 KB");
  most_shared = std::max(most_shared, shared_size);
  Grid g;
  g.size = size, g.block = block, g.body = &body;
  g.shared = static_cast<char*>(allocate(shared_size));
  g.shared_size = shared_size;
  g.first_block = blocks_run + 1;
  g.fibers = std::vector<Fiber>(threads);
  g.warps.resize((threads + 31) / 32);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = g.fibers[t];
    f.id = static_cast<int>(t), f.warp = static_cast<int>(t / 32);
    f.index = dim3(t % block.x, t / block.x % block.y, t / (block.x * block.y));
    f.stack = std::make_unique_for_overwrite<char[]>(kStack);
  }
  std::vector<uint64_t> blocks(uint64_t{size.x} * size.y * size.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  for (size_t i = blocks.size(); order != Order::kForward && i > 1; --i)
    std::swap(blocks[i - 1], blocks[random_number() % i]);
  grid = &g;
  struct Reset {
    ~Reset() { grid = nullptr; }
  } reset;
  for (const uint64_t b : blocks) {
    g.index = dim3(static_cast<unsigned>(b % size.x), static_cast<unsigned>(b / size.x % size.y),
                   static_cast<unsigned>(b / size.x / size.y));
    run_block();
  }
}

size_t most_shared_bytes() { return most_shared; }

Thread& self() { return *grid->current; }
dim3 block_index() { return grid->index; }
dim3 block_size() { return grid->block; }
bool on_fiber() { return grid && grid->current && !grid->current->done; }

void* shared_bytes(size_t needed) {
  if (needed > grid->shared_size)
    mistake("launch", "the kernel uses " + std::to_string(needed) +
                          " bytes of shared memory, the launch gave " +
                          std::to_string(grid->shared_size));
  return grid->shared;
}

void mistake(const char* kind, const std::string& text) {
  grid->error = std::make_unique<Error>(
      kind, text + ", by thread " + std::to_string(self().id) + " of " + block_name());
  leave();
  __builtin_unreachable();  // the scheduler throws and never comes back to this fiber
}

void collective(const char* name, Site site, void* data,
                void (*compute)(void* const (&lanes)[32])) {
  Fiber& me = *grid->current;
  Warp& warp = grid->warps[me.warp];
  if (warp.arrived && (std::strcmp(warp.name, name) || warp.site.line() != site.line()))
    mistake("divergence", std::string(name) + " at " + where(site) + " while other lanes are in " +
                              warp.name + " at " + where(warp.site));
  warp.name = name, warp.site = site;
  warp.data[me.id % 32] = data;
  if (++warp.arrived < 32) return wait(name, site);
  compute(warp.data);
  warp.arrived = 0;
  for (int lane = 0; lane < 32; ++lane) {
    Fiber& other = grid->fibers[static_cast<size_t>(me.warp * 32 + lane)];
    if (&other != &me) make_ready(other);
  }
}

void block_barrier(Site site) {
  if (grid->at_barrier && grid->barrier_site.line() != site.line())
    mistake("divergence", "sync_threads at " + where(site) + " while other threads are at " +
                              where(grid->barrier_site));
  grid->barrier_site = site;
  if (++grid->at_barrier < grid->alive) return wait("sync_threads", site);
  release_barrier();
}

void warp_barrier(Site site) {
  collective("sync_warp", site, nullptr,
             [](void* const(&)[32]) { ++grid->warps[grid->current->warp].interval; });
}

Now now() {
  const Fiber& f = *grid->current;
  return {
      grid->first_block, blocks_run, grid->interval, grid->warps[f.warp].interval, f.id, f.warp};
}

}  // namespace emulator
