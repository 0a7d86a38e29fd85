// How the executor reaches a kernel: a room registers, beside its torch op, a factory that checks
// the operands once and returns a closure over raw pointers. Running a step costs one indirect
// call.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "common/tensor.h"

namespace narrowcast {

// Scratch memory that lives as long as the step which captures it; 64-byte aligned.
std::shared_ptr<void> aligned_buffer(int64_t bytes);
// Bytes in all such buffers that are alive.
int64_t aligned_bytes();

// Weights repacked for this CPU, shared by all programs of a plan: key = canonical data pointer +
// layout.
class PackCache {
 public:
  using Buffer = std::shared_ptr<void>;
  template <class Make>
  Buffer get(const void* data, const std::string& layout, Make make) {
    Buffer& buffer = buffers_[{data, layout}];
    if (!buffer) {
      const int64_t before = aligned_bytes();
      buffer = make();
      bytes_ += aligned_bytes() - before;
    }
    return buffer;
  }
  int64_t bytes() const { return bytes_; }

 private:
  std::map<std::pair<const void*, std::string>, Buffer> buffers_;
  int64_t bytes_ = 0;
};

// One call of an op: its arguments in schema order. Tensors that were not given have rank -1.
struct StepSpec {
  std::string op;                   // "linear_int8"
  std::vector<TensorView> inputs;   // the Tensor and Tensor? arguments
  std::vector<bool> constant;       // inputs[i] is a weight: it never changes and may be prepacked
  std::vector<TensorView> outputs;  // what the op returns (nothing for kv_append)
  std::map<std::string, std::variant<int64_t, double, bool, std::string, std::vector<int64_t>>>
      attributes;

  int64_t integer(const char* name, int64_t otherwise = 0) const;
  double number(const char* name, double otherwise = 0) const;
  bool flag(const char* name, bool otherwise = false) const;
  std::string text(const char* name, const char* otherwise = "none") const;
  std::vector<int64_t> integers(const char* name) const;
};

using Step = std::function<void()>;
using StepFactory = Step (*)(const StepSpec& spec, PackCache& packed);

struct RegisterStep {
  RegisterStep(const char* op, StepFactory factory);
};

// nullptr when no room of this build serves op natively.
StepFactory find_step(const std::string& op);

}  // namespace narrowcast
