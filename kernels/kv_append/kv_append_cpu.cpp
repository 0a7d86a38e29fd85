// Where tensors stop: argument checks, the torch op, the executor's step.
#include "common/hadamard.h"
#include "common/rows.h"
#include "common/stable.h"
#include "common/step.h"
#include "kv_append/kv_append.h"

namespace narrowcast {
namespace {

constexpr const char* kOp = "kv_append";

struct Operands {
  TensorView k_cache, v_cache, k, v, start, k_scale, v_scale, cos, sin, block_table, k_shift;
};

bool same_sizes(const TensorView& x, const TensorView& y, int dims) {
  for (int d = 0; d < dims; ++d)
    if (x.sizes[d] != y.sizes[d]) return false;
  return true;
}

// A tensor that is written must hold every element once, as far as strides of 0 tell.
bool is_expanded(const TensorView& t) {
  for (int d = 0; d < t.rank; ++d)
    if (t.sizes[d] > 1 && t.strides[d] == 0) return true;
  return false;
}

void copy_strides(const TensorView& t, int64_t out[3]) {
  for (int d = 0; d < 3; ++d) out[d] = t.strides[d];
}

// Where the grids of 4-bit codes go, strides in pairs of bfloat16.
uint32_t* grids(const Operands& o, const TensorView& t, const char* label, int64_t strides[3]) {
  bool fits = t.dtype == DType::kBFloat16 && t.rank == 4 && same_sizes(t, o.k_cache, 3) &&
              t.sizes[3] == o.k_cache.sizes[3] / 8 && has_dense_rows(t) && !is_expanded(t) &&
              reinterpret_cast<uintptr_t>(t.data) % 4 == 0;
  for (int d = 0; fits && d < 3; ++d) fits = t.strides[d] % 2 == 0 || t.sizes[d] <= 1;
  NC_CHECK(fits, kOp, label,
           " must be bfloat16 [.., D / 16], steps and minima of the groups of its ", "uint8 cache ",
           shape(o.k_cache), ", and not expanded, got ", name(t.dtype), " ", shape(t));
  for (const TensorView* y : {&o.k_cache, &o.v_cache, &o.k, &o.v})
    NC_CHECK(!may_overlap(t, *y), kOp, label, " must not overlap another tensor");
  for (int d = 0; d < 3; ++d) strides[d] = t.strides[d] / 2;
  return static_cast<uint32_t*>(t.data);
}

KvAppendArgs append_args(const Operands& t, bool interleaved) {
  const bool paged = defined(t.block_table), int8 = t.k_cache.dtype == DType::kInt8,
             nibbles = t.k_cache.dtype == DType::kUInt8;
  const char* form = paged ? "[P, Hkv, page, D]" : "[B, Hkv, C, D]";
  NC_CHECK(is_floating(t.k.dtype) && t.k.rank == 4, kOp,
           "k must be float32, float16 or bfloat16 [B, Hkv, S, D], got ", name(t.k.dtype), " ",
           shape(t.k));
  NC_CHECK(t.v.dtype == t.k.dtype && t.v.rank == 4 && same_sizes(t.v, t.k, 4), kOp,
           "v must have the dtype and shape of k, ", name(t.k.dtype), " ", shape(t.k), ", got ",
           name(t.v.dtype), " ", shape(t.v));
  NC_CHECK(!nibbles || has_nibble_rows(t.k.sizes[3]), kOp,
           "k_cache must be uint8 only for head sizes of 32, 64, 128 or 256, got k ", shape(t.k));
  NC_CHECK((is_floating(t.k_cache.dtype) || int8 || nibbles) && t.k_cache.rank == 4 &&
               (paged || t.k_cache.sizes[0] == t.k.sizes[0]) &&
               t.k_cache.sizes[1] == t.k.sizes[1] &&
               t.k_cache.sizes[3] * (nibbles ? 2 : 1) == t.k.sizes[3],
           kOp, "k_cache must be float32, float16, bfloat16, int8 or uint8 ", form, " for k ",
           shape(t.k), ", got ", name(t.k_cache.dtype), " ", shape(t.k_cache));
  NC_CHECK(t.v_cache.dtype == t.k_cache.dtype && t.v_cache.rank == 4 &&
               same_sizes(t.v_cache, t.k_cache, 4),
           kOp, "v_cache must have the dtype and shape of k_cache, ", name(t.k_cache.dtype), " ",
           shape(t.k_cache), ", got ", name(t.v_cache.dtype), " ", shape(t.v_cache));
  for (const auto& [x, label] : {std::pair{&t.k_cache, "k_cache"}, {&t.v_cache, "v_cache"}})
    NC_CHECK(has_dense_rows(*x) && !is_expanded(*x), kOp, label,
             " must have stride 1 in the last dimension and not be expanded");
  NC_CHECK(!may_overlap(t.k_cache, t.v_cache), kOp, "v_cache must not overlap k_cache");
  for (const auto& [x, label] : {std::pair{&t.k, "k"}, {&t.v, "v"}}) {
    NC_CHECK(has_dense_rows(*x), kOp, label, " must have stride 1 in the last dimension");
    NC_CHECK(!may_overlap(*x, t.k_cache) && !may_overlap(*x, t.v_cache), kOp, label,
             " must not overlap a cache");
  }
  KvAppendArgs a = {};
  a.batch = t.k.sizes[0], a.heads = t.k.sizes[1], a.length = t.k.sizes[2], a.depth = t.k.sizes[3];
  a.capacity = t.k_cache.sizes[2];
  NC_CHECK(t.start.dtype == DType::kInt32 && t.start.rank == 1 && t.start.sizes[0] == a.batch &&
               is_contiguous(t.start),
           kOp, "start must be contiguous int32 [", a.batch, "], got ", name(t.start.dtype), " ",
           shape(t.start));
  if (int8) {
    for (const auto& [x, label] : {std::pair{&t.k_scale, "k_scale"}, {&t.v_scale, "v_scale"}}) {
      NC_CHECK(x->dtype == DType::kFloat32 && x->rank == 3 && same_sizes(*x, t.k_cache, 3) &&
                   !is_expanded(*x),
               kOp, label, " must be float32 of the shape of its int8 cache without D, ",
               shape(t.k_cache), ", and not expanded, got ", name(x->dtype), " ", shape(*x));
      for (const TensorView* y : {&t.k_cache, &t.v_cache, &t.k, &t.v})
        NC_CHECK(!may_overlap(*x, *y), kOp, label, " must not overlap another tensor");
    }
    NC_CHECK(!may_overlap(t.k_scale, t.v_scale), kOp, "v_scale must not overlap k_scale");
    a.k_scale = static_cast<float*>(t.k_scale.data);
    a.v_scale = static_cast<float*>(t.v_scale.data);
    copy_strides(t.k_scale, a.k_scale_strides), copy_strides(t.v_scale, a.v_scale_strides);
  } else if (nibbles) {
    a.k_pairs = grids(t, t.k_scale, "k_scale", a.k_scale_strides);
    a.v_pairs = grids(t, t.v_scale, "v_scale", a.v_scale_strides);
    NC_CHECK(!may_overlap(t.k_scale, t.v_scale), kOp, "v_scale must not overlap k_scale");
  } else {
    NC_CHECK(!defined(t.k_scale) && !defined(t.v_scale), kOp,
             "k_scale and v_scale must be absent for ", name(t.k_cache.dtype), " caches");
  }
  if (defined(t.k_shift)) {
    NC_CHECK(nibbles, kOp, "k_shift must be absent for ", name(t.k_cache.dtype), " caches");
    NC_CHECK(t.k_shift.dtype == DType::kFloat32 && t.k_shift.rank == 2 &&
                 t.k_shift.sizes[0] == a.heads && t.k_shift.sizes[1] == a.depth &&
                 is_contiguous(t.k_shift),
             kOp, "k_shift must be contiguous float32 [", a.heads, ", ", a.depth, "], got ",
             name(t.k_shift.dtype), " ", shape(t.k_shift));
    for (const TensorView* y : {&t.k_cache, &t.v_cache, &t.k_scale, &t.v_scale})
      NC_CHECK(!may_overlap(t.k_shift, *y), kOp, "k_shift must not overlap a cache or its grids");
    a.k_shift = static_cast<const float*>(t.k_shift.data);
  }
  if (defined(t.cos) || defined(t.sin)) {
    NC_CHECK(t.cos.dtype == DType::kFloat32 && t.cos.rank == 2 && is_contiguous(t.cos) &&
                 2 * t.cos.sizes[1] <= a.depth,
             kOp, "cos must be contiguous float32 [positions, R / 2] with R <= D = ", a.depth,
             ", got ", name(t.cos.dtype), " ", shape(t.cos));
    NC_CHECK(t.sin.dtype == DType::kFloat32 && t.sin.rank == 2 && is_contiguous(t.sin) &&
                 same_sizes(t.sin, t.cos, 2),
             kOp, "sin must be contiguous float32 of the shape of cos, ", shape(t.cos), ", got ",
             name(t.sin.dtype), " ", shape(t.sin));
    static const float none = 0;  // a table without elements is a table
    a.cos = t.cos.data ? static_cast<const float*>(t.cos.data) : &none;
    a.sin = t.sin.data ? static_cast<const float*>(t.sin.data) : &none;
    a.table_rows = t.cos.sizes[0], a.half = t.cos.sizes[1];
  }
  if (paged) {
    NC_CHECK(t.block_table.dtype == DType::kInt32 && t.block_table.rank == 2 &&
                 t.block_table.sizes[0] == a.batch && is_contiguous(t.block_table),
             kOp, "block_table must be contiguous int32 [B, pages], got ",
             name(t.block_table.dtype), " ", shape(t.block_table));
    a.page_size = a.capacity, a.pages = t.k_cache.sizes[0];
    a.table_stride = t.block_table.sizes[1];
    constexpr int64_t kMost = int64_t{1} << 30;
    NC_CHECK(a.page_size < kMost && a.table_stride < kMost, kOp,
             "block_table must describe fewer than 2^60 slots");
    a.capacity = a.page_size * a.table_stride;
    static const int32_t none = 0;
    a.block_table = t.block_table.data ? static_cast<const int32_t*>(t.block_table.data) : &none;
  }
  a.k = t.k.data, a.v = t.v.data, a.k_cache = t.k_cache.data, a.v_cache = t.v_cache.data;
  a.start = static_cast<const int32_t*>(t.start.data);
  copy_strides(t.k, a.k_strides), copy_strides(t.v, a.v_strides);
  copy_strides(t.k_cache, a.k_cache_strides), copy_strides(t.v_cache, a.v_cache_strides);
  a.dtype = t.k.dtype, a.cache_dtype = t.k_cache.dtype, a.interleaved = interleaved;
  return a;
}

void kv_append(Tensor k_cache, Tensor v_cache, const Tensor& k_in, const Tensor& v_in,
               const Tensor& start_in, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
               const std::optional<Tensor>& cos_in, const std::optional<Tensor>& sin_in,
               bool interleaved, const std::optional<Tensor>& table_in,
               const std::optional<Tensor>& shift_in) {
  const auto flat = [](const Tensor& t, const char* label) {
    view(t, kOp, label);  // refuses another device before it is copied
    return as_contiguous(t);
  };
  const auto rows = [&](const Tensor& t, const char* label) {
    return has_dense_rows(view(t, kOp, label)) ? t : torch::stable::contiguous(t);
  };
  const auto flat_if = [&](const std::optional<Tensor>& t, const char* label) {
    return t ? std::optional(flat(*t, label)) : std::nullopt;
  };
  const Tensor k = rows(k_in, "k"), v = rows(v_in, "v"), start = flat(start_in, "start");
  const auto cos = flat_if(cos_in, "cos"), sin = flat_if(sin_in, "sin"),
             table = flat_if(table_in, "block_table"), shift = flat_if(shift_in, "k_shift");
  kv_append_run(
      append_args({view(k_cache, kOp, "k_cache"), view(v_cache, kOp, "v_cache"), view(k, kOp, "k"),
                   view(v, kOp, "v"), view(start, kOp, "start"), view(k_scale, kOp, "k_scale"),
                   view(v_scale, kOp, "v_scale"), view(cos, kOp, "cos"), view(sin, kOp, "sin"),
                   view(table, kOp, "block_table"), view(shift, kOp, "k_shift")},
                  interleaved));
}

const RegisterStep kv_append_step(kOp, [](const StepSpec& s, PackCache&) -> Step {
  const KvAppendArgs args =
      append_args({s.inputs[0], s.inputs[1], s.inputs[2], s.inputs[3], s.inputs[4], s.inputs[5],
                   s.inputs[6], s.inputs[7], s.inputs[8], s.inputs[9], s.inputs[10]},
                  s.flag("interleaved"));
  return [args] { kv_append_run(args); };
});

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&narrowcast::kv_append));
}
