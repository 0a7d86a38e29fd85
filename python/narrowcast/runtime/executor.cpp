#include "executor.h"

#include <chrono>
#include <stdexcept>

namespace narrowcast {
namespace {

// The node's name goes in front of what the room says; made when the step is built, so that the
// loop itself has one handler and not one per step.
Step make(const std::string& node, const StepSpec& spec, PackCache& packed) {
  const StepFactory factory = find_step(spec.op);
  if (!factory) throw std::runtime_error(node + ": no native step for " + spec.op);
  try {
    return factory(spec, packed);
  } catch (const std::exception& error) {
    throw std::runtime_error("node " + node + ": " + error.what());
  }
}

}  // namespace

bool Program::has_native(const std::string& op) { return find_step(op) != nullptr; }
int64_t Program::buffer_bytes() { return aligned_bytes(); }

int64_t Program::add_native(const std::string& node, const StepSpec& spec, PackCache& packed) {
  steps_.push_back({node, make(node, spec, packed)});
  return size() - 1;
}

int64_t Program::add_callback(const std::string& node, Step callback) {
  steps_.push_back({node, std::move(callback)});
  return size() - 1;
}

void Program::replace_native(int64_t index, const StepSpec& spec, PackCache& packed) {
  Entry& entry = steps_.at(index);
  entry.step = make(entry.node, spec, packed);
}

void Program::replace_callback(int64_t index, Step callback) {
  steps_.at(index).step = std::move(callback);
}

void Program::run() const {
  const Entry* now = steps_.data();
  try {
    for (const Entry* end = now + steps_.size(); now != end; ++now) now->step();
  } catch (
      const std::runtime_error& error) {  // what rooms throw; the binding's own type passes through
    throw std::runtime_error("node " + now->node + ": " + error.what());
  }
}

void Program::run_timed(std::vector<double>& seconds) const {
  using Clock = std::chrono::steady_clock;
  seconds.resize(steps_.size());
  auto before = Clock::now();
  for (size_t i = 0; i < steps_.size(); ++i) {
    steps_[i].step();
    const auto after = Clock::now();
    seconds[i] = std::chrono::duration<double>(after - before).count();
    before = after;
  }
}

}  // namespace narrowcast
