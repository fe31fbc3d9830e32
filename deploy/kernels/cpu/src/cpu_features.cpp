#include <cstring>

#include "runtime.h"

namespace understudy {

#ifdef UNDERSTUDY_X86

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
static bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

#endif

const Kernels* find_kernels(const char* isa) {
  if (!std::strcmp(isa, "scalar")) return &kernels_scalar();
#ifdef UNDERSTUDY_X86
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx2") && has_avx2()) return &kernels_avx2();
  if (!std::strcmp(isa, "avxvnni") && has_avxvnni()) return &kernels_avxvnni();
  if (!std::strcmp(isa, "avx512vnni") && has_avx512vnni()) return &kernels_avx512vnni();
#endif
  return nullptr;
}

}  // namespace understudy
