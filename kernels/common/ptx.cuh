// Every way from a kernel to the machine: one small function per instruction, named after what it
// does. nvcc sees inline PTX here; g++ sees the same functions with a host meaning
// (tests/emulator/ptx_host.h), so one kernel source runs on a GPU and, checked, on a CPU.
//
// In brackets: the section of the PTX ISA by its title, which outlives its number. All sections but
// those of mma and ldmatrix ("Warp-level Matrix Instructions") stand under "Instructions". Fragment
// layouts ("Matrix Fragments for mma.m16n8k32" and so on): with group = lane / 4 and quad = lane %
// 4, in units of one 32-bit register,
//   a[0], a[1], a[2], a[3]   rows group, group + 8, group, group + 8; columns of quad, the last two
//                            in the second half of k
//   b[0], b[1]               column group; rows of quad, the second in the second half of k
//   d[0], d[1], d[2], d[3]   rows group, group, group + 8, group + 8; columns 2 quad, 2 quad + 1,
//                            2 quad, 2 quad + 1
// A register holds 4 consecutive k of 8 bits, or 2 of 16 bits.
#pragma once
#include <cstdint>

namespace narrowcast::ptx {

// Sixteen bytes, moved by one instruction.
struct alignas(16) Words4 {
  uint32_t word[4];
};

constexpr int kWarp = 32;

}  // namespace narrowcast::ptx

#ifndef __CUDACC__
#include "emulator/ptx_host.h"
#else

namespace narrowcast::ptx {

#define NC_DEVICE __device__ __forceinline__

// Address of a generic pointer in the shared state space. [Data Movement: cvta]
NC_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory as one struct.
template <class Shared>
NC_DEVICE Shared& shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return *reinterpret_cast<Shared*>(bytes);
}

// All threads of the block; orders their memory accesses. [Parallel Synchronization: bar]
NC_DEVICE void sync_threads() { __syncthreads(); }
// All lanes of the warp; orders their memory accesses. [Parallel Synchronization: bar.warp.sync]
NC_DEVICE void sync_warp() { __syncwarp(); }

// .bfly and .idx over all 32 lanes; orders no memory access. [Data Movement: shfl.sync]
template <class T>
NC_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
NC_DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

// 16 aligned bytes that nobody writes while the kernel runs. [Data Movement: ld.global.nc]
NC_DEVICE Words4 load_global_128(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
// 16 aligned bytes. [Data Movement: st]
NC_DEVICE void store_global_128(void* p, const Words4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
// 8 aligned bytes. [Data Movement: st]
NC_DEVICE void store_global_64(void* p, uint32_t low, uint32_t high) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(low), "r"(high) : "memory");
}
// 16 aligned bytes of shared memory. [Data Movement: ld, st]
NC_DEVICE Words4 load_shared_128(const void* p) {
  Words4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(shared_address(p))
               : "memory");
  return v;
}
NC_DEVICE void store_shared_128(void* p, const Words4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// 16 bytes past the L1 cache, of which `bytes` are read and the rest are zero. Nobody may touch the
// destination before the copy was waited for. [Data Movement: cp.async]
NC_DEVICE void cp_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
// The copies since the last commit form a group, perhaps an empty one. [cp.async.commit_group]
NC_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last kPending groups of this thread have landed, for this thread only.
// [cp.async.wait_group]
template <int kPending>
NC_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows x 16 bytes. Lane l brings the address of row l % 8 of matrix l / 8; r[i]
// of lane l is word l % 4 of row l / 4 of matrix i. [Warp-level Matrix Instructions: ldmatrix]
NC_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same with each matrix of 16-bit elements transposed: r[i] holds rows 2 (l % 4) and one more,
// of column l / 4.
NC_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, exact in int32 (wrapping). [Matrix Fragments for mma.m16n8k32; mma]
#define NC_MMA_INT(name, types)                                                          \
  NC_DEVICE void name(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k32.row.col." types                              \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"      \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));    \
  }
NC_MMA_INT(mma_s8_s8, "s32.s8.s8.s32")
NC_MMA_INT(mma_u8_s8, "s32.u8.s8.s32")
#undef NC_MMA_INT

// d += a b, accumulated in float32. [Matrix Fragments for mma.m16n8k16 with floating point; mma]
#define NC_MMA_FLOAT(name, types)                                                      \
  NC_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col." types                            \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));  \
  }
NC_MMA_FLOAT(mma_f16, "f32.f16.f16.f32")
NC_MMA_FLOAT(mma_bf16, "f32.bf16.bf16.f32")
#undef NC_MMA_FLOAT

// sum + the dot product of four signed bytes. [Integer Arithmetic: dp4a]
NC_DEVICE int32_t dp4a(uint32_t a, uint32_t b, int32_t sum) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

// Byte i of the result is byte (selector >> 4 i) % 8 of a (0 .. 3) and b (4 .. 7), selector bits 3
// being 0. [Data Movement: prmt]
NC_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// a b + c of two 16-bit floats each, rounded once. [Half Precision Floating-Point: fma]
#define NC_FMA_HALVES(name, type)                                              \
  NC_DEVICE uint32_t name(uint32_t a, uint32_t b, uint32_t c) {                \
    uint32_t d;                                                                \
    asm("fma.rn." type " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); \
    return d;                                                                  \
  }
NC_FMA_HALVES(fma_f16x2, "f16x2")
NC_FMA_HALVES(fma_bf16x2, "bf16x2")
#undef NC_FMA_HALVES

// No result, no order. [Parallel Synchronization: red]
NC_DEVICE void atomic_add(int64_t* p, int64_t v) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

// Between float32 and the bits of a 16-bit float, to nearest even. [Data Movement: cvt]
NC_DEVICE uint16_t float16_bits(float v) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
NC_DEVICE uint16_t bfloat16_bits(float v) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
// Two of them, the first in the low half. [Data Movement: cvt]
NC_DEVICE uint32_t pack_f16x2(float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
NC_DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
NC_DEVICE float float_of_float16(uint16_t h) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
  return v;
}
NC_DEVICE float float_of_bfloat16(uint16_t h) {
  return __uint_as_float(static_cast<uint32_t>(h) << 16);
}
NC_DEVICE uint32_t bits_of_float(float v) { return __float_as_uint(v); }
NC_DEVICE float float_of_bits(uint32_t v) { return __uint_as_float(v); }

#undef NC_DEVICE

}  // namespace narrowcast::ptx
#endif
