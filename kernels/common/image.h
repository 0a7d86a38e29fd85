// Images: logically [N, C, H, W], in memory NHWC ("channels-last"). Not for ISA files.
#pragma once
#include <memory>
#include <vector>

#include "common/scratch.h"
#include "common/tensor.h"
#include "common/window_checks.h"

namespace narrowcast {

// Strides of an NHWC image; sizes of 1 may have any stride.
bool is_channels_last(const TensorView& t);
// t as it would lie at `data` in NHWC.
TensorView channels_last_at(const TensorView& t, void* data);
// Copies an image of any strides to NHWC.
void copy_channels_last(const TensorView& from, void* to);

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
