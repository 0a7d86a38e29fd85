// What the matrix products on tensor cores share (linear_int8, linear_grouped, conv2d_int8): the
// tile of a block, and the ring of buffers that K goes by in.
#pragma once
#include "common/ptx.cuh"

namespace narrowcast {

constexpr int kStep = 64;   // values of K in a buffer
constexpr int kChunk = 16;  // bytes of one copy

// kM x kN results of a block; its warps are a grid of warp tiles kWarpM x kWarpN.
template <int kRows_, int kColumns_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Tile {
  static constexpr int kM = kRows_, kN = kColumns_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kThreads = kWarpsM_ * kWarpsN_ * ptx::kWarp;
  static constexpr int kWarpM = kM / kWarpsM_, kWarpN = kN / kWarpsN_;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "fragments of w are loaded 16 rows at once");
};

// All of K: load(step) asks for the copies of a step into buffer step % kStages, compute(step)
// multiplies what they brought. A step needs one barrier: it makes the step's copies visible to
// all, and shows that all have left the buffer of the step before, which is refilled next. After
// this the ring is free for something else.
template <int kStages, class Step, class Load, class Compute>
__device__ __forceinline__ void through_ring(Step steps, const Load& load, const Compute& compute) {
  // one group of copies per step, even where no copy is left
  for (Step step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    ptx::cp_async_commit();
  }
  for (Step step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_threads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    ptx::cp_async_commit();
    compute(step);
  }
  ptx::sync_threads();
}

}  // namespace narrowcast
