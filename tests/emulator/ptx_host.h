// The host meaning of common/ptx.cuh: the same names, and the CUDA words that kernels use.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulator {
// threadIdx, blockIdx and blockDim: each member asks who is running.
template <auto kWhat>
struct Index {
  template <unsigned dim3::* kMember>
  struct Member {
    operator unsigned() const { return kWhat().*kMember; }
  };
  Member<&dim3::x> x;
  Member<&dim3::y> y;
  Member<&dim3::z> z;
};
inline dim3 thread_index() { return self().index; }
}  // namespace emulator
inline const emulator::Index<emulator::thread_index> threadIdx;
inline const emulator::Index<emulator::block_index> blockIdx;
inline const emulator::Index<emulator::block_size> blockDim;

namespace narrowcast::ptx {

using emulator::Site;

template <class Shared>
Shared& shared_memory() {
  return *static_cast<Shared*>(emulator::shared_bytes(sizeof(Shared)));
}

inline void sync_threads(Site site = Site::current()) { emulator::block_barrier(site); }
inline void sync_warp(Site site = Site::current()) { emulator::warp_barrier(site); }

uint32_t shuffle_bits_xor(uint32_t v, int mask, Site site);
uint32_t shuffle_bits(uint32_t v, int lane, Site site);
template <class T>
T shuffle_xor(T v, int mask, Site site = Site::current()) {
  static_assert(sizeof(T) == 4);
  return __builtin_bit_cast(T, shuffle_bits_xor(__builtin_bit_cast(uint32_t, v), mask, site));
}
template <class T>
T shuffle(T v, int lane, Site site = Site::current()) {
  static_assert(sizeof(T) == 4);
  return __builtin_bit_cast(T, shuffle_bits(__builtin_bit_cast(uint32_t, v), lane, site));
}

Words4 load_global_128(const void* p);
void store_global_128(void* p, const Words4& v);
void store_global_64(void* p, uint32_t low, uint32_t high);
Words4 load_shared_128(const void* p);
void store_shared_128(void* p, const Words4& v);

void cp_async_16(void* shared, const void* global, int bytes = 16);
void cp_async_commit();
void cp_async_wait_for(int pending);
template <int kPending>
void cp_async_wait() {
  cp_async_wait_for(kPending);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current());
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::current());
void mma_s8_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               Site site = Site::current());
void mma_u8_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               Site site = Site::current());
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
             Site site = Site::current());
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              Site site = Site::current());

int32_t dp4a(uint32_t a, uint32_t b, int32_t sum);
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector);
uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c);
uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c);
void atomic_add(int64_t* p, int64_t v);

uint16_t float16_bits(float v);
uint16_t bfloat16_bits(float v);
uint32_t pack_f16x2(float low, float high);
uint32_t pack_bf16x2(float low, float high);
float float_of_float16(uint16_t h);
float float_of_bfloat16(uint16_t h);
inline uint32_t bits_of_float(float v) { return __builtin_bit_cast(uint32_t, v); }
inline float float_of_bits(uint32_t v) { return __builtin_bit_cast(float, v); }

}  // namespace narrowcast::ptx
