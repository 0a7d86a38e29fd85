#include "linear/linear.h"

namespace narrowcast {
namespace {

// Panel: [K][64] as float32, so that the inner loop runs over columns.
template <DType kDType>
void pack(const void* w, int64_t ldw, int columns, int64_t depth, void* panel) {
  float* p = static_cast<float*>(panel);
  for (int64_t k = 0; k < depth; ++k)
    for (int n = 0; n < kLinearPanel; ++n)
      p[k * kLinearPanel + n] = n < columns ? load_float(w, n * ldw + k, kDType) : 0.0f;
}

void block(const LinearArgs& a, const void* panel, int64_t m0, int64_t m1, int64_t n0,
           int columns) {
  const float* w = static_cast<const float*>(panel);
  for (int64_t m = m0; m < m1; ++m) {
    const float* x = static_cast<const float*>(a.x) + m * a.ldx;
    float acc[kLinearPanel] = {};
    for (int64_t k = 0; k < a.depth; ++k)
      for (int n = 0; n < kLinearPanel; ++n) acc[n] += x[k] * w[k * kLinearPanel + n];
    for (int n = 0; n < columns; ++n) finish(a.epilogue, acc[n], m, n0 + n);
  }
}

constexpr LinearFormat kFloat32 = {"f32", DType::kFloat32, 1, 4, pack<DType::kFloat32>,
                                   block, nullptr};
constexpr LinearFormat kFloat16 = {"f16 as f32",          DType::kFloat32, 1,      4,
                                   pack<DType::kFloat16>, block,           nullptr};
constexpr LinearFormat kBFloat16 = {"bf16 as f32",          DType::kFloat32, 1,      4,
                                    pack<DType::kBFloat16>, block,           nullptr};

}  // namespace

extern const LinearKernel linear_generic = {&kFloat32, &kFloat16, &kBFloat16};

}  // namespace narrowcast
