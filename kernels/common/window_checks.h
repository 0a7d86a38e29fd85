// The checks of images and windows that every image op shares, on the CPU and on CUDA.
#pragma once
#include <vector>

#include "common/tensor.h"
#include "common/window.h"

namespace narrowcast {

// Refuses what is not an image [N, C, H, W] with H, W >= 1 and at most 2^40 elements.
void check_image(const char* op, const char* argument, const TensorView& t);
// Reads the window's arguments; an empty list stands for its default. Refuses lengths other than 2
// and values out of range. uneven: padding may be 4 numbers, top, left, bottom and right.
Window make_window(const char* op, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, bool uneven = false);
// Positions of the window along axis d of an image of `size`; refuses a window larger than the
// padded image. ceil: a last position that overhangs counts when it starts inside the image or its
// left padding.
// `argument`: where the op takes the kernel's size from.
int64_t window_positions(const char* op, const Window& w, int d, int64_t size, bool ceil = false,
                         const char* argument = "kernel_size");

}  // namespace narrowcast
