// A test program: named cases, each run under several seeds; ends with 1 when one failed.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "emulator/memory.h"
#include "emulator/simt.h"

namespace check {

inline int failed = 0, passed = 0;
inline bool quick =
    false;  // one seed, and the first failure ends the program: for the mutation test

// Runs `body` under seeds 0 .. seeds - 1; it must end with a mistake of `kind`, "" for none. Where
// the order decides how a bug shows, `kind` lists the ways: "race|uninitialised read".
inline void expect(const char* name, const char* kind, int seeds,
                   const std::function<void()>& body) {
  for (int seed = 0; seed < (quick ? 1 : seeds); ++seed) {
    emulator::release_all();
    emulator::set_seed(static_cast<uint64_t>(seed));
    std::string got, text;
    try {
      body();
    } catch (const emulator::Error& e) {
      got = e.kind, text = e.what();
    } catch (const std::exception& e) {
      got = "exception", text = e.what();
    }
    if (got == kind || (!got.empty() && std::string(kind).find(got) != std::string::npos)) {
      ++passed;
      continue;
    }
    ++failed;
    std::printf("FAILED %s, seed %d: expected '%s', got '%s' %s\n", name, seed, kind, got.c_str(),
                text.c_str());
    if (quick) std::exit(1);
  }
}

inline void require(bool condition, const std::string& text) {
  if (!condition) throw std::runtime_error(text);
}

inline int result(const char* program) {
  std::printf("%s: %d passed, %d failed, at most %zu bytes of shared memory\n", program, passed,
              failed, emulator::most_shared_bytes());
  return failed != 0;
}

}  // namespace check
