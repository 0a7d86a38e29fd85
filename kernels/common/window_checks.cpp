#include "common/window_checks.h"

#include "common/check.h"

namespace narrowcast {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;

std::vector<int64_t> numbers_of(const char* op, const char* argument, std::vector<int64_t> v,
                                int64_t least, int64_t otherwise, bool four = false) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  if (v.empty()) return {otherwise, otherwise};
  bool good = v.size() == 2 || (four && v.size() == 4);
  for (const int64_t n : v) good &= n >= least && n <= most;
  NC_CHECK(good, op, argument, four ? " must be 2 or 4 numbers from " : " must be 2 numbers from ",
           least, " to ", most, ", got ", v.size(), " beginning with ", v[0]);
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
                   const std::vector<int64_t>& dilation, bool uneven) {
  const auto k = numbers_of(op, "kernel_size", kernel, 1, 1),
             s = numbers_of(op, "stride", stride, 1, 1),
             p = numbers_of(op, "padding", padding, 0, 0, uneven),
             d = numbers_of(op, "dilation", dilation, 1, 1);
  Window w;
  for (int i = 0; i < 2; ++i)
    w.kernel[i] = k[i], w.stride[i] = s[i], w.padding[i] = p[i], w.end[i] = p[p.size() - 2 + i],
    w.dilation[i] = d[i];
  return w;
}

int64_t window_positions(const char* op, const Window& w, int d, int64_t size, bool ceil,
                         const char* argument) {
  const int64_t extent = w.dilation[d] * (w.kernel[d] - 1) + 1;
  const int64_t span = size + w.padding[d] + w.end[d] - extent;
  NC_CHECK(span >= 0, op, argument, " must fit the padded image, got ", w.kernel[d],
           " with dilation ", w.dilation[d], " on ", size, " with padding ", w.padding[d], " and ",
           w.end[d]);
  if (!ceil) return span / w.stride[d] + 1;
  const int64_t positions = (span + w.stride[d] - 1) / w.stride[d] + 1;
  return (positions - 1) * w.stride[d] >= size + w.padding[d] ? positions - 1 : positions;
}

}  // namespace narrowcast
