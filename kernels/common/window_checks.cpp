#include "common/window_checks.h"

#include "common/check.h"

namespace narrowcast {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;

std::vector<int64_t> pair_of(const char* op, const char* argument, const std::vector<int64_t>& v,
                             int64_t least, int64_t otherwise) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  if (v.empty()) return {otherwise, otherwise};
  NC_CHECK(v.size() == 2 && v[0] >= least && v[1] >= least && v[0] <= most && v[1] <= most, op,
           argument, " must be 2 numbers from ", least, " to ", most, ", got ", v.size(),
           " beginning with ", v[0]);
  return v;
}

}  // namespace

void check_image(const char* op, const char* argument, const TensorView& t) {
  NC_CHECK(t.rank == 4 && t.sizes[2] >= 1 && t.sizes[3] >= 1 && numel(t) <= kMost, op, argument,
           " must be [N, C, H, W] with H and W at least 1 and at most 2^40 elements, got ",
           shape(t));
}

Window make_window(const char* op, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation) {
  const auto k = pair_of(op, "kernel_size", kernel, 1, 1), s = pair_of(op, "stride", stride, 1, 1),
             p = pair_of(op, "padding", padding, 0, 0), d = pair_of(op, "dilation", dilation, 1, 1);
  Window w;
  for (int i = 0; i < 2; ++i)
    w.kernel[i] = k[i], w.stride[i] = s[i], w.padding[i] = p[i], w.dilation[i] = d[i];
  return w;
}

int64_t window_positions(const char* op, const Window& w, int d, int64_t size, bool ceil,
                         const char* argument) {
  const int64_t extent = w.dilation[d] * (w.kernel[d] - 1) + 1;
  const int64_t span = size + 2 * w.padding[d] - extent;
  NC_CHECK(span >= 0, op, argument, " must fit the padded image, got ", w.kernel[d],
           " with dilation ", w.dilation[d], " on ", size, " with padding ", w.padding[d]);
  if (!ceil) return span / w.stride[d] + 1;
  const int64_t positions = (span + w.stride[d] - 1) / w.stride[d] + 1;
  return (positions - 1) * w.stride[d] >= size + w.padding[d] ? positions - 1 : positions;
}

}  // namespace narrowcast
