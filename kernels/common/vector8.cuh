// Eight neighbouring values in float32: what a thread of a row kernel moves at once, by loads and
// stores of 128 bits where the addresses allow it.
#pragma once
#include "common/ptx.cuh"
#include "common/tensor_view.h"

namespace narrowcast {

constexpr int kVector = 8;

template <DType kType>
constexpr int kBytesOf = kType == DType::kFloat32 ? 4 : 2;

template <DType kType>
__device__ __forceinline__ float load_one(const void* x, int64_t i) {
  if constexpr (kType == DType::kFloat32) {
    return static_cast<const float*>(x)[i];
  } else {
    const uint16_t h = static_cast<const uint16_t*>(x)[i];
    return kType == DType::kFloat16 ? ptx::float_of_float16(h) : ptx::float_of_bfloat16(h);
  }
}

// Values i .. i + 7 of x, which nobody writes meanwhile, or `count` of x one by one.
template <DType kType, bool kAligned>
__device__ __forceinline__ void load_vector(const void* x, int64_t i, int64_t count,
                                            float (&v)[kVector]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = i + e < count ? load_one<kType>(x, i + e) : 0.0f;
  } else if constexpr (kType == DType::kFloat32) {
    const float* from = static_cast<const float*>(x) + i;
    const ptx::Words4 low = ptx::load_global_128(from), high = ptx::load_global_128(from + 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      v[e] = ptx::float_of_bits(low.word[e]);
      v[e + 4] = ptx::float_of_bits(high.word[e]);
    }
  } else {
    const ptx::Words4 words = ptx::load_global_128(static_cast<const uint16_t*>(x) + i);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const uint16_t h = static_cast<uint16_t>(words.word[e / 2] >> e % 2 * 16);
      v[e] = kType == DType::kFloat16 ? ptx::float_of_float16(h) : ptx::float_of_bfloat16(h);
    }
  }
}

template <DType kType>
__device__ __forceinline__ uint16_t half_bits(float v) {
  return kType == DType::kFloat16 ? ptx::float16_bits(v) : ptx::bfloat16_bits(v);
}

template <DType kType, bool kAligned>
__device__ __forceinline__ void store_vector(void* y, int64_t i, int64_t count,
                                             const float (&v)[kVector]) {
  if constexpr (kType == DType::kFloat32) {
    float* to = static_cast<float*>(y) + i;
    if constexpr (kAligned) {
      ptx::store_global_128(to, {ptx::bits_of_float(v[0]), ptx::bits_of_float(v[1]),
                                 ptx::bits_of_float(v[2]), ptx::bits_of_float(v[3])});
      ptx::store_global_128(to + 4, {ptx::bits_of_float(v[4]), ptx::bits_of_float(v[5]),
                                     ptx::bits_of_float(v[6]), ptx::bits_of_float(v[7])});
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (i + e < count) to[e] = v[e];
    }
  } else {
    uint16_t* to = static_cast<uint16_t*>(y) + i;
    if constexpr (kAligned) {
      ptx::Words4 words = {};
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        words.word[e / 2] |= static_cast<uint32_t>(half_bits<kType>(v[e])) << e % 2 * 16;
      ptx::store_global_128(to, words);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (i + e < count) to[e] = half_bits<kType>(v[e]);
    }
  }
}

// Eight codes of 8 bits.
template <bool kAligned>
__device__ __forceinline__ void store_codes(void* q, int64_t i, int64_t count,
                                            const int32_t (&code)[kVector]) {
  uint8_t* to = static_cast<uint8_t*>(q) + i;
  if constexpr (kAligned) {
    uint32_t word[2] = {};
#pragma unroll
    for (int e = 0; e < kVector; ++e) word[e / 4] |= (code[e] & 255u) << e % 4 * 8;
    ptx::store_global_64(to, word[0], word[1]);
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (i + e < count) to[e] = static_cast<uint8_t>(code[e]);
  }
}

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace narrowcast
