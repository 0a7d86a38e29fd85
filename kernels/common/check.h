// NC_CHECK(condition, op, parts...): throws "<op>: <parts>" when the condition is false.
// Wording: "<op>: <argument> must be <expectation>, got <value>".
#pragma once
#include <sstream>
#include <stdexcept>

#define NC_CHECK(condition, op, ...)       \
  do {                                     \
    if (!(condition)) [[unlikely]] {       \
      ::narrowcast::fail(op, __VA_ARGS__); \
    }                                      \
  } while (0)

namespace narrowcast {

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace narrowcast
