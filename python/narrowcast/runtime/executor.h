// The step loop. Plain C++: no torch, no Python.
//
// A program is the list of a graph's steps for one set of concrete shapes. A step is a closure over
// raw pointers: a room's kernel made by its factory, or a callback that the binding made for any
// other node.
#pragma once
#include <string>
#include <vector>

#include "common/step.h"

#define NC_EXPORT __attribute__((visibility("default")))

namespace narrowcast {

class NC_EXPORT Program {
 public:
  // Does a room of this build serve `op`?
  static bool has_native(const std::string& op);
  // Bytes that steps and pack caches of this process hold in aligned buffers.
  static int64_t buffer_bytes();

  // Appends a step and returns its index. `node` names it in errors.
  int64_t add_native(const std::string& node, const StepSpec& spec, PackCache& packed);
  int64_t add_callback(const std::string& node, Step callback);
  // The same step over other pointers.
  void replace_native(int64_t index, const StepSpec& spec, PackCache& packed);
  void replace_callback(int64_t index, Step callback);

  void run() const;
  // Runs once; seconds[i] becomes the time of step i.
  void run_timed(std::vector<double>& seconds) const;
  int64_t size() const { return static_cast<int64_t>(steps_.size()); }

 private:
  struct Entry {
    std::string node;
    Step step;
  };
  std::vector<Entry> steps_;
};

}  // namespace narrowcast
