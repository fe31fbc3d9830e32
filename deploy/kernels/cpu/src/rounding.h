// docs/numerics.md keeps subnormals and rounds to nearest, whatever the process has set for itself.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace understudy {

class DefaultRounding {
 public:
#ifdef __x86_64__
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  unsigned saved_;
#else
  DefaultRounding() {}
#endif
};

}  // namespace understudy
