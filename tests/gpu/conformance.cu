// Every instruction of common/ptx.cuh on given words: conformance IN OUT, run by conformance.py.
// nvcc makes the program that runs on a GPU, g++ with the emulator the one that says what a GPU
// must give.
//
// A case is a kernel; block b, one warp, reads its words at in + b * inputs and writes those at out
// + b * outputs, which hold 0xcdcdcdcd before. IN holds the words of every block of the first case
// of the table, then those of the second, and so on; OUT likewise.
#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "common/launch.h"
#ifndef __CUDACC__
#include "emulator/memory.h"
#endif

namespace narrowcast {
namespace {

using namespace ptx;

constexpr int kBlocks = 64;
constexpr uint32_t kPoison = 0xcdcdcdcdu;

struct Case {
  const char* name;
  void (*kernel)(const uint32_t* in, uint32_t* out);
  int inputs, outputs;  // words per block; a multiple of 4, so that blocks stay aligned
};

// 32 rows of 16 bytes, as ldmatrix and the wide moves address them.
struct Rows {
  alignas(16) uint32_t word[2][kWarp][4];
};

__global__ void shuffle_xor_words(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 32, out += blockIdx.x * 192;
  for (int bit = 0; bit < 5; ++bit) out[bit * 32 + lane] = shuffle_xor(in[lane], 1 << bit);
  out[160 + lane] = bits_of_float(shuffle_xor(float_of_bits(in[lane]), 21));
}

__global__ void shuffle_words(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 64, out += blockIdx.x * 32;
  out[lane] = shuffle(in[lane], static_cast<int>(in[32 + lane] & 31));
}

__global__ void global_moves(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 128, out += blockIdx.x * 192;
  const Words4 v = load_global_128(in + lane * 4);
  store_global_128(out + (31 - lane) * 4, v);
  store_global_64(out + 128 + lane * 2, v.word[3], v.word[0]);
}

__global__ void shared_moves(const uint32_t* in, uint32_t* out) {
  Rows& rows = shared_memory<Rows>();
  const int lane = threadIdx.x;
  in += blockIdx.x * 128, out += blockIdx.x * 128;
  store_shared_128(rows.word[0][lane], load_global_128(in + lane * 4));
  sync_threads();
  store_global_128(out + lane * 4, load_shared_128(rows.word[0][(lane * 7 + 3) % 32]));
}

// Two groups of copies, each lane's of its own size, over words that are not zero.
__global__ void async_copies(const uint32_t* in, uint32_t* out) {
  Rows& rows = shared_memory<Rows>();
  const int lane = threadIdx.x;
  in += blockIdx.x * 288, out += blockIdx.x * 256;
  for (int group = 0; group < 2; ++group)
    for (int i = 0; i < 4; ++i) rows.word[group][lane][i] = kPoison;
  sync_warp();
  for (int group = 0; group < 2; ++group) {
    const int bytes = group == 0 ? 16 : static_cast<int>(in[256 + lane] % 17);
    cp_async_16(rows.word[group][31 - lane], in + (group * 32 + lane) * 4, bytes);
    cp_async_commit();
  }
  cp_async_wait<1>();
  sync_warp();
  store_global_128(out + lane * 4, load_shared_128(rows.word[0][lane]));
  cp_async_wait<0>();
  sync_warp();
  store_global_128(out + (32 + lane) * 4, load_shared_128(rows.word[1][lane]));
}

template <bool kTransposed>
__global__ void matrices(const uint32_t* in, uint32_t* out) {
  Rows& rows = shared_memory<Rows>();
  const int lane = threadIdx.x;
  in += blockIdx.x * 160, out += blockIdx.x * 128;
  store_shared_128(rows.word[0][lane], load_global_128(in + lane * 4));
  sync_warp();
  const void* row = rows.word[0][in[128 + lane] & 31];
  uint32_t r[4];
  if constexpr (kTransposed)
    ldmatrix_x4_trans(r, row);
  else
    ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

// A lane's words: 4 of a, 2 of b, 4 of d.
struct Fragments {
  uint32_t a[4], b[2];
};
__device__ Fragments fragments(const uint32_t* in) {
  Fragments f;
  for (int i = 0; i < 4; ++i) f.a[i] = in[i];
  for (int i = 0; i < 2; ++i) f.b[i] = in[4 + i];
  return f;
}

template <bool kUnsigned>
__global__ void integer_products(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 320 + lane * 10, out += blockIdx.x * 128 + lane * 4;
  const Fragments f = fragments(in);
  int32_t d[4];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<int32_t>(in[6 + i]);
  if constexpr (kUnsigned)
    mma_u8_s8(d, f.a, f.b);
  else
    mma_s8_s8(d, f.a, f.b);
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint32_t>(d[i]);
}

template <bool kBrain>
__global__ void float_products(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 320 + lane * 10, out += blockIdx.x * 128 + lane * 4;
  const Fragments f = fragments(in);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = float_of_bits(in[6 + i]);
  if constexpr (kBrain)
    mma_bf16(d, f.a, f.b);
  else
    mma_f16(d, f.a, f.b);
  for (int i = 0; i < 4; ++i) out[i] = bits_of_float(d[i]);
}

__global__ void dot_products(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 96, out += blockIdx.x * 32;
  out[lane] =
      static_cast<uint32_t>(dp4a(in[lane], in[32 + lane], static_cast<int32_t>(in[64 + lane])));
}

__global__ void permutations(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 96, out += blockIdx.x * 32;
  out[lane] = permute_bytes(in[lane], in[32 + lane], in[64 + lane] & 0x7777u);
}

template <bool kBrain>
__global__ void half_sums(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 96, out += blockIdx.x * 32;
  const uint32_t a = in[lane], b = in[32 + lane], c = in[64 + lane];
  if constexpr (kBrain)
    out[lane] = fma_bf16x2(a, b, c);
  else
    out[lane] = fma_f16x2(a, b, c);
}

__global__ void atomic_sums(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 64, out += blockIdx.x * 8;
  const uint64_t v = uint64_t{in[32 + lane]} << 32 | in[lane];
  atomic_add(reinterpret_cast<int64_t*>(out) + lane % 4, static_cast<int64_t>(v));
}

// A lane converts two floats: one by one, then packed.
template <bool kBrain>
__global__ void to_halves(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 64, out += blockIdx.x * 64;
  const float low = float_of_bits(in[lane]), high = float_of_bits(in[32 + lane]);
  if constexpr (kBrain) {
    out[lane] = bfloat16_bits(low) | uint32_t{bfloat16_bits(high)} << 16;
    out[32 + lane] = pack_bf16x2(low, high);
  } else {
    out[lane] = float16_bits(low) | uint32_t{float16_bits(high)} << 16;
    out[32 + lane] = pack_f16x2(low, high);
  }
}

template <bool kBrain>
__global__ void from_halves(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  in += blockIdx.x * 32, out += blockIdx.x * 64;
  for (int i = 0; i < 2; ++i) {
    const uint16_t h = static_cast<uint16_t>(in[lane] >> 16 * i);
    const float v = kBrain ? float_of_bfloat16(h) : float_of_float16(h);
    out[i * 32 + lane] = bits_of_float(v);
  }
}

const Case kCases[] = {
    {"shuffle_xor", shuffle_xor_words, 32, 192},
    {"shuffle", shuffle_words, 64, 32},
    {"global_moves", global_moves, 128, 192},
    {"shared_moves", shared_moves, 128, 128},
    {"cp_async", async_copies, 288, 256},
    {"ldmatrix_x4", matrices<false>, 160, 128},
    {"ldmatrix_x4_trans", matrices<true>, 160, 128},
    {"mma_s8_s8", integer_products<false>, 320, 128},
    {"mma_u8_s8", integer_products<true>, 320, 128},
    {"mma_f16", float_products<false>, 320, 128},
    {"mma_bf16", float_products<true>, 320, 128},
    {"dp4a", dot_products, 96, 32},
    {"permute_bytes", permutations, 96, 32},
    {"fma_f16x2", half_sums<false>, 96, 32},
    {"fma_bf16x2", half_sums<true>, 96, 32},
    {"atomic_add", atomic_sums, 64, 8},
    {"to_float16", to_halves<false>, 64, 64},
    {"to_bfloat16", to_halves<true>, 64, 64},
    {"from_float16", from_halves<false>, 32, 64},
    {"from_bfloat16", from_halves<true>, 32, 64},
};

#ifdef __CUDACC__

struct Memory {
  uint32_t* data = nullptr;
  explicit Memory(const std::vector<uint32_t>& words) : bytes_(words.size() * 4) {
    check_cuda("conformance", cudaMalloc(&data, bytes_));
    check_cuda("conformance", cudaMemcpy(data, words.data(), bytes_, cudaMemcpyHostToDevice));
  }
  ~Memory() { cudaFree(data); }
  void read(uint32_t* words) const {  // waits for the kernel, whose errors it returns
    check_cuda("conformance", cudaMemcpy(words, data, bytes_, cudaMemcpyDeviceToHost));
  }

 private:
  size_t bytes_;
};
using Input = Memory;

#else

// Outputs count as written: atomics add to what is there.
struct Memory {
  uint32_t* data;
  explicit Memory(const std::vector<uint32_t>& words)
      : data(emulator::Buffer<uint32_t>(words.size()).data), count_(words.size()) {
    std::copy(words.begin(), words.end(), data);
    emulator::mark_written(data, count_ * 4);
  }
  void read(uint32_t* words) const { std::copy(data, data + count_, words); }

 private:
  size_t count_;
};
using Input = emulator::Buffer<uint32_t>;

#endif

std::vector<uint32_t> run(const Case& c, const std::vector<uint32_t>& words) {
  std::vector<uint32_t> results(static_cast<size_t>(kBlocks) * c.outputs, kPoison);
  const Input in(words);
  const Memory out(results);
  launch(c.name, c.kernel, dim3(kBlocks), dim3(kWarp), sizeof(Rows), nullptr, in.data, out.data);
  out.read(results.data());
  return results;
}

void run_all(const char* from, const char* to) {
  std::FILE* in = std::fopen(from, "rb");
  std::FILE* out = std::fopen(to, "wb");
  NC_CHECK(in && out, "conformance", "IN and OUT must be files, got ", from, " and ", to);
  for (const Case& c : kCases) {
    std::vector<uint32_t> words(static_cast<size_t>(kBlocks) * c.inputs);
    NC_CHECK(std::fread(words.data(), 4, words.size(), in) == words.size(), "conformance",
             "IN must hold the words of every case, got an end in ", c.name);
    const std::vector<uint32_t> results = run(c, words);
    NC_CHECK(std::fwrite(results.data(), 4, results.size(), out) == results.size(), "conformance",
             "OUT must take all results, got no room in ", to);
  }
  NC_CHECK(std::fgetc(in) == EOF, "conformance", "IN must end with the last case, got more");
  std::fclose(in);
  NC_CHECK(std::fclose(out) == 0, "conformance", "OUT must take all results, got no room in ", to);
}

}  // namespace
}  // namespace narrowcast

int main(int count, char** arguments) {
  try {
    NC_CHECK(count == 3, "conformance", "arguments must be IN and OUT, got ", count - 1);
    narrowcast::run_all(arguments[1], arguments[2]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
