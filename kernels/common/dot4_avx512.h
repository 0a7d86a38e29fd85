// Products of bytes for the kernels compiled with VNNI.
#pragma once
#include <immintrin.h>

namespace narrowcast {
namespace {

// In each of 16 lanes, sum += the four products of unsigned bytes of `codes` and signed ones of
// `values`. In assembly, as GCC 12 keeps copies of each sum around the intrinsic.
[[gnu::always_inline]] inline void dot4(__m512i& sum, __m512i codes, __m512i values) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(values));
}

}  // namespace
}  // namespace narrowcast
