// Images: logically [N, C, H, W], in memory NHWC ("channels-last"). Not for ISA files.
#pragma once
#include <memory>
#include <vector>

#include "common/scratch.h"
#include "common/tensor.h"
#include "common/window.h"

namespace narrowcast {

// Strides of an NHWC image; sizes of 1 may have any stride.
bool is_channels_last(const TensorView& t);
// t as it would lie at `data` in NHWC.
TensorView channels_last_at(const TensorView& t, void* data);
// Copies an image of any strides to NHWC.
void copy_channels_last(const TensorView& from, void* to);

// Refuses what is not an image [N, C, H, W] with H, W >= 1 and at most 2^40 elements.
void check_image(const char* op, const char* argument, const TensorView& t);
// Reads the window's arguments; an empty list stands for its default. Refuses lengths other than 2
// and values out of range.
Window make_window(const char* op, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation);
// Positions of the window along axis d of an image of `size`; refuses a window larger than the
// padded image. ceil: a last position that overhangs counts when it starts inside the image or its
// left padding.
// `argument`: where the op takes the kernel's size from.
int64_t window_positions(const char* op, const Window& w, int d, int64_t size, bool ceil = false,
                         const char* argument = "kernel_size");

// An image read in place when it is channels-last, else from a copy that lives as long as this.
class ReadableImage {
 public:
  explicit ReadableImage(const TensorView& t) : view_(t) {
    if (!defined(t) || is_channels_last(t)) return;
    copy_ = std::make_unique<ThreadScratch>(numel(t) * element_size(t.dtype));
    copy_channels_last(t, copy_->data());
    view_ = channels_last_at(t, copy_->data());
  }
  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  std::unique_ptr<ThreadScratch> copy_;
};

// The same for a step: the copy's memory is made once, and refresh() runs before each call.
class StepImage {
 public:
  explicit StepImage(const TensorView& t);
  const TensorView& view() const { return view_; }
  void refresh() const {
    if (copy_) copy_channels_last(source_, copy_.get());
  }

 private:
  TensorView source_, view_;
  std::shared_ptr<void> copy_;
};

}  // namespace narrowcast
