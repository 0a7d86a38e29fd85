#include "common/ptx.cuh"

#include "common/half.h"
#include "emulator/memory.h"

namespace narrowcast::ptx {
namespace {

using emulator::Access;
using emulator::access_aligned;

struct Shuffle {
  uint32_t v;
  int from;
  uint32_t result;
};

uint32_t shuffled(Shuffle mine, const char* name, Site site) {
  if (mine.from < 0 || mine.from > 31)
    emulator::mistake("divergence", "shuffle from a lane that does not exist");
  emulator::collective(name, site, &mine, [](void* const(&lanes)[32]) {
    for (void* lane : lanes) {
      Shuffle& s = *static_cast<Shuffle*>(lane);
      s.result = static_cast<Shuffle*>(lanes[s.from])->v;
    }
  });
  return mine.result;
}

struct Fragments {
  void* d;
  const uint32_t *a, *b;
};

// The layouts of the PTX ISA: which element of a 16 x k or k x 8 matrix byte i of a lane's
// registers is. kBytes is the size of an element; a register spans 4 / kBytes columns of k.
template <class Element, int kDepth, class Sum>
void multiply(void* const (&lanes)[32]) {
  constexpr int kPerWord = 4 / sizeof(Element), kHalf = kDepth / 2;
  Element a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<const Fragments*>(lanes[lane]);
    const int group = lane / 4, quad = lane % 4;
    for (int word = 0; word < 4; ++word)
      std::memcpy(&a[group + word % 2 * 8][word / 2 * kHalf + quad * kPerWord], &f.a[word], 4);
    for (int word = 0; word < 2; ++word) {
      Element column[kPerWord];
      std::memcpy(column, &f.b[word], 4);
      for (int i = 0; i < kPerWord; ++i) b[word * kHalf + quad * kPerWord + i][group] = column[i];
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      Sum::add(
          static_cast<const Fragments*>(lanes[lane])->d, i,
          [&](int k) { return Sum::product(a[row][k], b[k][column]); }, kDepth);
    }
}

struct IntegerSum {
  template <class F>
  static void add(void* d, int i, F product, int depth) {
    uint32_t& sum =
        static_cast<uint32_t*>(d)[i];  // wraps, as the instruction does without .satfinite
    for (int k = 0; k < depth; ++k) sum += static_cast<uint32_t>(product(k));
  }
};
struct Signed : IntegerSum {
  static int32_t product(uint8_t a, uint8_t b) {
    return static_cast<int8_t>(a) * static_cast<int8_t>(b);
  }
};
struct UnsignedSigned : IntegerSum {
  static int32_t product(uint8_t a, uint8_t b) { return a * static_cast<int8_t>(b); }
};
// The order of the hardware's sum is not specified; in float64 the error is that of one rounding.
struct FloatSum {
  template <class F>
  static void add(void* d, int i, F product, int depth) {
    float& sum = static_cast<float*>(d)[i];
    double total = sum;
    for (int k = 0; k < depth; ++k) total += product(k);
    sum = static_cast<float>(total);
  }
};
struct Half : FloatSum {
  static double product(uint16_t a, uint16_t b) {
    return double{from_float16(a)} * from_float16(b);
  }
};
struct BrainFloat : FloatSum {
  static double product(uint16_t a, uint16_t b) {
    return double{from_bfloat16(a)} * from_bfloat16(b);
  }
};

struct Matrices {
  uint32_t* r;
  const void* row;
};

void land(const emulator::Copy& c) {
  std::memcpy(c.to, c.from, c.bytes);
  std::memset(static_cast<char*>(c.to) + c.bytes, 0, 16 - c.bytes);
}

}  // namespace

uint32_t shuffle_bits_xor(uint32_t v, int mask, Site site) {
  return shuffled({v, (emulator::self().id % 32) ^ mask, 0}, "shuffle_xor", site);
}
uint32_t shuffle_bits(uint32_t v, int lane, Site site) {
  return shuffled({v, lane, 0}, "shuffle", site);
}

Words4 load_global_128(const void* p) {
  access_aligned(p, 16, 16, Access::kRead, "load_global_128");
  return *static_cast<const Words4*>(p);
}
void store_global_128(void* p, const Words4& v) {
  access_aligned(p, 16, 16, Access::kWrite, "store_global_128");
  *static_cast<Words4*>(p) = v;
}
void store_global_64(void* p, uint32_t low, uint32_t high) {
  access_aligned(p, 8, 8, Access::kWrite, "store_global_64");
  static_cast<uint32_t*>(p)[0] = low, static_cast<uint32_t*>(p)[1] = high;
}
Words4 load_shared_128(const void* p) {
  access_aligned(p, 16, 16, Access::kRead, "load_shared_128");
  return *static_cast<const Words4*>(p);
}
void store_shared_128(void* p, const Words4& v) {
  access_aligned(p, 16, 16, Access::kWrite, "store_shared_128");
  *static_cast<Words4*>(p) = v;
}

void cp_async_16(void* shared, const void* global, int bytes) {
  if (bytes < 0 || bytes > 16) emulator::mistake("out of bounds", "cp_async_16 of a size over 16");
  access_aligned(global, bytes, 16, Access::kRead, "cp_async_16 from");
  if (reinterpret_cast<uintptr_t>(shared) % 16)
    emulator::mistake("misaligned", "cp_async_16 to shared memory");
  emulator::copy_begins(shared, 16);
  emulator::Copy c{shared, global, bytes, (emulator::random_number() & 1) != 0};
  if (c.landed) land(c);
  emulator::self().open.push_back(c);
}

void cp_async_commit() {
  emulator::Thread& me = emulator::self();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void cp_async_wait_for(int pending) {
  auto& groups = emulator::self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const emulator::Copy& c : groups.front()) {
      if (!c.landed) land(c);
      emulator::copy_ends(c.to, 16);
    }
    groups.erase(groups.begin());
  }
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site) {
  access_aligned(row, 16, 16, Access::kRead, "ldmatrix_x4");
  Matrices mine{r, row};
  emulator::collective("ldmatrix_x4", site, &mine, [](void* const(&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const void* from = static_cast<Matrices*>(lanes[i * 8 + lane / 4])->row;
        static_cast<Matrices*>(lanes[lane])->r[i] = static_cast<const uint32_t*>(from)[lane % 4];
      }
  });
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site) {
  access_aligned(row, 16, 16, Access::kRead, "ldmatrix_x4_trans");
  Matrices mine{r, row};
  emulator::collective("ldmatrix_x4_trans", site, &mine, [](void* const(&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        uint32_t word = 0;
        for (int e = 0; e < 2; ++e) {
          const void* from = static_cast<Matrices*>(lanes[i * 8 + lane % 4 * 2 + e])->row;
          word |= uint32_t{static_cast<const uint16_t*>(from)[lane / 4]} << (16 * e);
        }
        static_cast<Matrices*>(lanes[lane])->r[i] = word;
      }
  });
}

#define MMA(name, D, Element, depth, Sum)                                          \
  void name(D(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) { \
    Fragments mine{d, a, b};                                                       \
    emulator::collective(#name, site, &mine, multiply<Element, depth, Sum>);       \
  }
MMA(mma_s8_s8, int32_t, uint8_t, 32, Signed)
MMA(mma_u8_s8, int32_t, uint8_t, 32, UnsignedSigned)
MMA(mma_f16, float, uint16_t, 16, Half)
MMA(mma_bf16, float, uint16_t, 16, BrainFloat)
#undef MMA

int32_t dp4a(uint32_t a, uint32_t b, int32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 8)
    result |= static_cast<uint32_t>(both >> (selector >> i / 2) % 8 * 8 & 255) << i;
  return result;
}

namespace {

// The sum of two doubles as a float32 whose last bit stands for all that is lost: rounding it to 16
// bits is then rounding once.
float odd_sum(double a, double b) {
  const double sum = a + b, rest = b - (sum - a);
  const float near = static_cast<float>(sum);
  const double lost = (sum - near) + rest;
  uint32_t bits = __builtin_bit_cast(uint32_t, near);
  if (lost == 0 || !std::isfinite(near) || (bits & 1)) return near;
  return __builtin_bit_cast(float, bits + ((lost < 0) == std::signbit(near) ? 1 : -1));
}

template <class From, class To>
uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c, From from, To to) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto half = [&](uint32_t v) { return from(static_cast<uint16_t>(v >> i)); };
    const float v = odd_sum(double{half(a)} * half(b), half(c));
    result |= uint32_t{to(v)} << i;
  }
  return result;
}

}  // namespace

uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return fma_halves(a, b, c, from_float16, to_float16);
}
uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return fma_halves(a, b, c, from_bfloat16, to_bfloat16);
}

void atomic_add(int64_t* p, int64_t v) {
  access_aligned(p, 8, 8, Access::kAtomic, "atomic_add");
  *p += v;
}

uint16_t float16_bits(float v) { return to_float16(v); }
uint16_t bfloat16_bits(float v) { return to_bfloat16(v); }
uint32_t pack_f16x2(float low, float high) {
  return to_float16(low) | uint32_t{to_float16(high)} << 16;
}
uint32_t pack_bf16x2(float low, float high) {
  return to_bfloat16(low) | uint32_t{to_bfloat16(high)} << 16;
}
float float_of_float16(uint16_t h) { return from_float16(h); }
float float_of_bfloat16(uint16_t h) { return from_bfloat16(h); }

}  // namespace narrowcast::ptx
