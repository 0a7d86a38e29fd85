// The checks that every compiled backend of linear_grouped makes: tensors in, LinearGroupedArgs
// out.
#pragma once
#include "common/rows.h"
#include "common/stable.h"
#include "linear_grouped/linear_grouped_layout.h"

namespace narrowcast::linear_grouped_checks {

constexpr const char* kOp = "linear_grouped";

struct Options {
  int64_t activation_bits;
  const char* activation;
  const char* post_activation;
};

inline GroupedLayout weight_layout(const TensorView& packed, const TensorView& scale,
                                   const TensorView& offset, int64_t group_size, int64_t bits,
                                   const char* op) {
  NC_CHECK(bits == 4 || bits == 8, op, "bits must be 4 or 8, got ", bits);
  NC_CHECK(packed.rank == 2 && (packed.dtype == DType::kUInt8 || packed.dtype == DType::kInt8), op,
           "packed must be uint8 or int8 [N, K * bits / 8], got ", name(packed.dtype), " ",
           shape(packed));
  const int64_t n = packed.sizes[0], k = packed.sizes[1] * 8 / bits;
  NC_CHECK(group_size > 0 && group_size % 32 == 0 && k % group_size == 0, op,
           "group_size must be a multiple of 32 that divides K = ", k, ", got ", group_size);
  NC_CHECK(scale.dtype == DType::kFloat32 || scale.dtype == DType::kFloat16, op,
           "scale must be float32 or float16, got ", name(scale.dtype));
  NC_CHECK(scale.rank == 2 && scale.sizes[0] == n && scale.sizes[1] == k / group_size, op,
           "scale must be [N, K / group_size] = [", n, ", ", k / group_size, "], got ",
           shape(scale));
  NC_CHECK(!defined(offset) || (offset.dtype == scale.dtype && offset.rank == 2 &&
                                offset.sizes[0] == n && offset.sizes[1] == scale.sizes[1]),
           op, "offset must have the shape and dtype of scale, ", name(scale.dtype), " ",
           shape(scale), ", got ", name(offset.dtype), " ", shape(offset));
  return grouped_layout(n, k, group_size, static_cast<int>(bits), scale.dtype == DType::kFloat16,
                        defined(offset));
}

// Everything but the weights.
inline LinearGroupedArgs checked_args(const GroupedLayout& layout, const TensorView& x,
                                      const TensorView& bias, const TensorView& residual,
                                      const Options& options, DType out_dtype) {
  NC_CHECK(x.rank >= 1 && is_floating(x.dtype) && size(x, -1) == layout.k, kOp,
           "x must be float32, float16 or bfloat16 [..., K] with K = ", layout.k, ", got ",
           name(x.dtype), " ", shape(x));
  NC_CHECK(
      !defined(bias) || (is_floating(bias.dtype) && bias.rank == 1 && bias.sizes[0] == layout.n),
      kOp, "bias must be float32, float16 or bfloat16 [N] = [", layout.n, "], got ",
      name(bias.dtype), " ", shape(bias));
  int64_t m = 1;
  for (int d = 0; d < x.rank - 1; ++d) m *= x.sizes[d];
  if (defined(residual)) {
    bool same =
        is_floating(residual.dtype) && residual.rank == x.rank && size(residual, -1) == layout.n;
    for (int d = 0; same && d < x.rank - 1; ++d) same = residual.sizes[d] == x.sizes[d];
    NC_CHECK(same, kOp,
             "residual must be float32, float16 or bfloat16 [..., N] with N = ", layout.n,
             " and the leading sizes of x ", shape(x), ", got ", name(residual.dtype), " ",
             shape(residual));
  }
  NC_CHECK(options.activation_bits == 8 || options.activation_bits == 16 ||
               options.activation_bits == 32,
           kOp, "activation_bits must be 8, 16 or 32, got ", options.activation_bits);
  NC_CHECK(is_floating(out_dtype), kOp, "out_dtype must be float32, float16 or bfloat16, got ",
           name(out_dtype));
  LinearGroupedArgs a = {};
  a.layout = layout;
  a.x = x.data, a.x_dtype = x.dtype, a.m = m;
  a.activation_bits = static_cast<int>(options.activation_bits);
  Epilogue& e = a.epilogue;
  e.bias = bias.data, e.bias_dtype = bias.dtype;
  e.residual = residual.data, e.residual_dtype = residual.dtype;
  e.ld_residual = e.ld_out = layout.n;
  e.activation = parse_activation(options.activation, kOp, "activation");
  e.post_activation = parse_activation(options.post_activation, kOp, "post_activation");
  e.out_dtype = out_dtype;
  return a;
}

inline std::vector<int64_t> out_sizes(const TensorView& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.rank);
  sizes.back() = n;
  return sizes;
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional(narrowcast::as_contiguous(*t)) : std::nullopt;
}

}  // namespace narrowcast::linear_grouped_checks
