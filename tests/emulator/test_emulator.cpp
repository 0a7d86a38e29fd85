// The emulator's own test: right kernels pass under every order, each planted bug is named.
#include <vector>

#include "check.h"
#include "common/half.h"
#include "common/launch.h"

using namespace narrowcast;
using check::expect;
using check::require;
using emulator::Buffer;

namespace {

constexpr int kSeeds = 8;

struct Floats {
  float v[128];
};

// Each thread writes its element and reads its neighbour's, twice.
enum class Rotate { kRight, kNoBarrier, kNoTrailingBarrier, kNobodyWrites };
__global__ void rotate(const float* in, float* out, Rotate how) {
  Floats& shared = ptx::shared_memory<Floats>();
  const unsigned t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    if (how != Rotate::kNobodyWrites) shared.v[t] = in[t] + round;
    if (how != Rotate::kNoBarrier) ptx::sync_threads();
    out[(blockIdx.x * 2 + round) * 128 + t] = shared.v[(t + 1) % 128];
    if (how != Rotate::kNoTrailingBarrier) ptx::sync_threads();
  }
}

void run_rotate(Rotate how) {
  std::vector<float> values(128);
  for (int i = 0; i < 128; ++i) values[i] = i;
  const Buffer<float> in(values), out(3 * 256);
  launch("rotate", rotate, dim3(3), dim3(128), sizeof(Floats), nullptr, in.data, out.data, how);
}

// The same within a warp, ordered by sync_warp or not.
__global__ void rotate_warp(float* out, bool ordered) {
  Floats& shared = ptx::shared_memory<Floats>();
  const unsigned t = threadIdx.x;
  shared.v[t] = t;
  if (ordered) ptx::sync_warp();
  out[blockIdx.x * 128 + t] = shared.v[t / 32 * 32 + (t + 1) % 32];
}

// A ring of two buffers filled by asynchronous copies.
struct Ring {
  alignas(16) uint32_t v[2][128 * 4];
};
enum class Pipe { kRight, kWaitTooFew, kNoWait, kNoBarrier, kNoTrailingBarrier, kNoCommit };
__global__ void pipe(const uint32_t* in, uint32_t* out, int steps, Pipe how) {
  Ring& ring = ptx::shared_memory<Ring>();
  const unsigned t = threadIdx.x;
  const auto load = [&](int step) {
    if (step < steps) ptx::cp_async_16(&ring.v[step % 2][t * 4], in + (step * 128 + t) * 4);
    if (how != Pipe::kNoCommit) ptx::cp_async_commit();
  };
  load(0);
  for (int step = 0; step < steps; ++step) {
    load(step + 1);
    if (how == Pipe::kWaitTooFew)
      ptx::cp_async_wait<2>();
    else if (how != Pipe::kNoWait)
      ptx::cp_async_wait<1>();
    if (how != Pipe::kNoBarrier) ptx::sync_threads();
    out[step * 128 + t] = ring.v[step % 2][(t + 1) % 128 * 4 + 3];
    if (how != Pipe::kNoTrailingBarrier) ptx::sync_threads();
  }
}

void run_pipe(Pipe how) {
  std::vector<uint32_t> values(3 * 128 * 4);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i);
  const Buffer<uint32_t> in(values), out(3 * 128);
  launch("pipe", pipe, dim3(1), dim3(128), sizeof(Ring), nullptr, in.data, out.data, 3, how);
  for (int step = 0; step < 3; ++step)
    for (int t = 0; t < 128; ++t)
      require(out[step * 128 + t] == values[(step * 128 + (t + 1) % 128) * 4 + 3], "wrong value");
}

// One product by the tensor core, operands through ldmatrix; `shift` moves one fragment's row.
struct Operands {
  alignas(16) int8_t a[16][32], b[8][32];
};
__global__ void product(const int8_t* a, const int8_t* b, int32_t* d, int shift) {
  Operands& s = ptx::shared_memory<Operands>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 512; i += 32) s.a[i / 32][i % 32] = a[i];
  for (int i = lane; i < 256; i += 32) s.b[i / 32][i % 32] = b[i];
  ptx::sync_warp();
  uint32_t fa[4], fb[4], two[2];
  ptx::ldmatrix_x4(fa, &s.a[(lane + shift) % 16][lane / 16 * 16]);
  ptx::ldmatrix_x4(fb, &s.b[lane % 8][lane / 8 % 2 * 16]);
  two[0] = fb[0], two[1] = fb[1];
  int32_t sum[4] = {};
  ptx::mma_s8_s8(sum, fa, two);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

void run_product(int shift) {
  std::vector<int8_t> a(512), b(256);
  for (auto* v : {&a, &b})
    for (int8_t& x : *v) x = static_cast<int8_t>(emulator::random_number());
  const Buffer<int8_t> da(a), db(b);
  const Buffer<int32_t> d(128);
  launch("product", product, dim3(1), dim3(32), sizeof(Operands), nullptr, da.data, db.data, d.data,
         shift);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[m * 32 + k] * b[n * 32 + k];
      require(d[m * 8 + n] == sum, "wrong product");
    }
}

// a [16, 16] b [16, 8] of 16-bit floats, b by rows of k: its fragments come transposed.
struct HalfOperands {
  alignas(16) uint16_t a[16][16], b[16][8];
};
__global__ void half_product(const uint16_t* a, const uint16_t* b, float* d, bool brain) {
  HalfOperands& s = ptx::shared_memory<HalfOperands>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) s.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) s.b[i / 8][i % 8] = b[i];
  ptx::sync_warp();
  uint32_t fa[4], fb[4], two[2];
  ptx::ldmatrix_x4(fa, &s.a[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix_x4_trans(fb, &s.b[lane % 16][0]);
  two[0] = fb[0], two[1] = fb[1];
  float sum[4] = {};
  if (brain)
    ptx::mma_bf16(sum, fa, two);
  else
    ptx::mma_f16(sum, fa, two);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

void run_half_product(bool brain) {
  const auto bits = [&](float v) { return brain ? to_bfloat16(v) : to_float16(v); };
  std::vector<float> a(256), b(128);
  std::vector<uint16_t> ha, hb;
  for (auto* v : {&a, &b})
    for (float& x : *v) x = static_cast<int>(emulator::random_number() % 33) - 16;
  for (const float x : a) ha.push_back(bits(x));
  for (const float x : b) hb.push_back(bits(x));
  const Buffer<uint16_t> da(ha), db(hb);
  const Buffer<float> d(128);
  launch("half_product", half_product, dim3(1), dim3(32), sizeof(HalfOperands), nullptr, da.data,
         db.data, d.data, brain);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[m * 16 + k] * b[k * 8 + n];
      require(d[m * 8 + n] == sum, "wrong product");
    }
}

// Unsigned by signed, with the fragments taken from memory by the layout of the PTX ISA.
__global__ void unsigned_product(const uint8_t* a, const int8_t* b, int32_t* d) {
  const int lane = threadIdx.x, group = lane / 4, quad = lane % 4;
  uint32_t fa[4] = {}, fb[2] = {};
  for (int i = 0; i < 16; ++i)
    fa[i / 4] |= uint32_t{a[(group + i / 4 % 2 * 8) * 32 + quad * 4 + i % 4 + i / 8 * 16]}
                 << i % 4 * 8;
  for (int i = 0; i < 8; ++i)
    fb[i / 4] |= uint32_t{static_cast<uint8_t>(b[group * 32 + quad * 4 + i % 4 + i / 4 * 16])}
                 << i % 4 * 8;
  int32_t sum[4] = {};
  ptx::mma_u8_s8(sum, fa, fb);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + quad * 2 + i % 2] = sum[i];
}

void run_unsigned_product() {
  std::vector<uint8_t> a(512);
  std::vector<int8_t> b(256);
  for (uint8_t& x : a) x = static_cast<uint8_t>(emulator::random_number());
  for (int8_t& x : b) x = static_cast<int8_t>(emulator::random_number());
  const Buffer<uint8_t> da(a);
  const Buffer<int8_t> db(b);
  const Buffer<int32_t> d(128);
  launch("unsigned_product", unsigned_product, dim3(1), dim3(32), 0, nullptr, da.data, db.data,
         d.data);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[m * 32 + k] * b[n * 32 + k];
      require(d[m * 8 + n] == sum, "wrong product");
    }
}

void run_halves() {
  const auto two = [](float low, float high, auto to) {
    return to(low) | uint32_t{to(high)} << 16;
  };
  require(ptx::permute_bytes(0x33221100u, 0x77665544u, 0x7041) == 0x77004411u, "wrong bytes");
  require(ptx::pack_f16x2(1.5f, -2049.0f) == two(1.5f, -2048.0f, to_float16) &&
              ptx::pack_bf16x2(257.0f, -3.0f) == two(256.0f, -3.0f, to_bfloat16),
          "wrong pair");
  // A sum just over the middle of two neighbours, by less than float32 holds: it is rounded once.
  const float tiny = 1.0f / (1 << 14);
  require(ptx::fma_f16x2(two(1039, tiny, to_float16), two(1, tiny, to_float16),
                         two(-1032, 1.0f, to_float16)) == two(7, 1, to_float16),
          "wrong float16 sum");
  require(ptx::fma_f16x2(two(2050, tiny, to_float16), two(1, tiny, to_float16),
                         two(1, 0, to_float16)) == two(2052, 0, to_float16),
          "wrong middle");
  require(ptx::fma_bf16x2(two(143, 0x1p-80f, to_bfloat16), two(1, 1, to_bfloat16),
                          two(-136, 1, to_bfloat16)) == two(7, 1, to_bfloat16),
          "wrong bfloat16 sum");
  // (1 + 2^-4)^2 = 1 + 2^-3 + 2^-8: the middle of two bfloat16 numbers, but for c.
  const float a = 1.0f + 1.0f / 16;
  require(ptx::fma_bf16x2(two(a, a, to_bfloat16), two(a, a, to_bfloat16),
                          two(0x1p-60f, -0x1p-60f, to_bfloat16)) ==
              two(1.125f + 1.0f / 128, 1.125f, to_bfloat16),
          "not rounded once");
}

__global__ void sum_of_lanes(const float* in, float* out) {
  float v = in[threadIdx.x];
  for (int mask = 16; mask; mask /= 2) v += ptx::shuffle_xor(v, mask);
  if (threadIdx.x == 0) out[0] = v;
}

__global__ void reads_past(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
__global__ void writes_past(float* out) { out[threadIdx.x + 1] = 1.0f; }
__global__ void writes_input(float* in) { in[threadIdx.x] = 1.0f; }
__global__ void all_write_one(float* out) { out[0] = 1.0f; }
__global__ void all_add_one(int64_t* out) { ptx::atomic_add(out, 1); }
__global__ void reads_output(float* out) { out[threadIdx.x] = out[threadIdx.x] + 1.0f; }
__global__ void misaligned(const float* in, uint32_t* out) {
  out[threadIdx.x] = ptx::load_global_128(in + threadIdx.x).word[0];
}
__global__ void half_a_barrier(float* out) {
  if (threadIdx.x < 16) ptx::sync_warp();
  out[threadIdx.x] = 0.0f;
}
__global__ void two_barriers(float* out) {
  if (threadIdx.x < 64)
    ptx::sync_threads();
  else
    ptx::sync_threads();
  out[threadIdx.x] = 0.0f;
}
__global__ void two_collectives(float* out) {
  const float v = threadIdx.x % 2 ? ptx::shuffle(1.0f, 0) : ptx::shuffle_xor(1.0f, 1);
  out[threadIdx.x] = v;
}
__global__ void barrier_and_collective(float* out) {
  if (threadIdx.x % 32 < 16)
    ptx::sync_threads();
  else
    ptx::sync_warp();
  out[threadIdx.x] = 0.0f;
}
__global__ void leaves_copy(const float* in) {
  Ring& ring = ptx::shared_memory<Ring>();
  ptx::cp_async_16(&ring.v[0][threadIdx.x * 4], in + threadIdx.x * 4);
  ptx::cp_async_commit();
}

template <class... P, class... A>
void run(void (*kernel)(P...), unsigned blocks, unsigned threads, A... arguments) {
  launch("test", kernel, dim3(blocks), dim3(threads), sizeof(Ring), nullptr, arguments...);
}

}  // namespace

int main() {
  expect("rotate", "", kSeeds, [] { run_rotate(Rotate::kRight); });
  expect("missing barrier", "race|uninitialised read", kSeeds,
         [] { run_rotate(Rotate::kNoBarrier); });
  expect("missing trailing barrier", "race", kSeeds,
         [] { run_rotate(Rotate::kNoTrailingBarrier); });
  expect("uninitialised read", "uninitialised read", kSeeds,
         [] { run_rotate(Rotate::kNobodyWrites); });
  const auto warp = [](bool ordered) {
    const Buffer<float> out(256);
    run(rotate_warp, 2, 128, out.data, ordered);
  };
  expect("warp barrier", "", kSeeds, [&] { warp(true); });
  expect("missing warp barrier", "race|uninitialised read", kSeeds, [&] { warp(false); });

  expect("pipe", "", kSeeds, [] { run_pipe(Pipe::kRight); });
  expect("wait count too high", "copy in flight", kSeeds, [] { run_pipe(Pipe::kWaitTooFew); });
  expect("no wait", "copy in flight", kSeeds, [] { run_pipe(Pipe::kNoWait); });
  expect("wait without barrier", "race|copy in flight|uninitialised read", kSeeds,
         [] { run_pipe(Pipe::kNoBarrier); });
  expect("refill without barrier", "race|copy in flight", kSeeds,
         [] { run_pipe(Pipe::kNoTrailingBarrier); });
  expect("no commit", "copy in flight", kSeeds, [] { run_pipe(Pipe::kNoCommit); });

  expect("product", "", kSeeds, [] { run_product(0); });
  expect("wrong fragment row", "exception", kSeeds, [] { run_product(1); });
  expect("float16 product", "", kSeeds, [] { run_half_product(false); });
  expect("bfloat16 product", "", kSeeds, [] { run_half_product(true); });
  expect("unsigned product", "", kSeeds, [] { run_unsigned_product(); });
  expect("halves", "", 1, run_halves);
  expect("shuffles", "", kSeeds, [] {
    const Buffer<float> in(std::vector<float>(32, 2.0f)), out(1);
    run(sum_of_lanes, 1, 32, in.data, out.data);
    require(out[0] == 64.0f, "wrong sum");
  });

  const std::vector<float> ones(64, 1.0f);
  expect("read past the end", "out of bounds", kSeeds, [&] {
    const Buffer<float> in(ones), out(64);
    run(reads_past, 1, 64, in.data, out.data);
  });
  expect("write past the end", "out of bounds", kSeeds, [] {
    const Buffer<float> out(64);
    run(writes_past, 1, 64, out.data);
  });
  expect("write to an input", "write to constant memory", kSeeds, [&] {
    const Buffer<float> in(ones);
    run(writes_input, 1, 64, in.data);
  });
  expect("threads write one word", "race", kSeeds, [] {
    const Buffer<float> out(1);
    run(all_write_one, 1, 64, out.data);
  });
  expect("blocks write one word", "race", kSeeds, [] {
    const Buffer<float> out(1);
    run(all_write_one, 2, 1, out.data);
  });
  expect("atomics", "", kSeeds, [] {
    const Buffer<int64_t> out(1);
    out[0] = 0;
    emulator::mark_written(out.data, 8);
    run(all_add_one, 4, 64, out.data);
    require(out[0] == 256, "wrong sum");
  });
  expect("read of an output", "uninitialised read", kSeeds, [] {
    const Buffer<float> out(64);
    run(reads_output, 1, 64, out.data);
  });
  expect("misaligned vector", "misaligned", kSeeds, [&] {
    const Buffer<float> in(ones, 1);
    const Buffer<uint32_t> out(1);
    run(misaligned, 1, 1, in.data, out.data);
  });
  const auto with_output = [](const char* name, const char* kind, void (*kernel)(float*)) {
    expect(name, kind, kSeeds, [=] {
      const Buffer<float> out(128);
      run(kernel, 1, 128, out.data);
    });
  };
  with_output("half a warp at a barrier", "deadlock", half_a_barrier);
  with_output("two barriers", "divergence", two_barriers);
  with_output("two collectives", "divergence", two_collectives);
  with_output("barrier and collective", "deadlock", barrier_and_collective);
  expect("copy not waited for", "copy in flight", kSeeds, [&] {
    const Buffer<float> in(std::vector<float>(512, 1.0f));
    run(leaves_copy, 1, 128, in.data);
  });
  expect("too much shared memory", "launch", 1, [] {
    const Buffer<float> out(128);
    launch("test", half_a_barrier, dim3(1), dim3(32), 100 * 1024, nullptr, out.data);
  });
  return check::result("emulator");
}
