#include <cstring>

#ifdef UNDERSTUDY_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef UNDERSTUDY_AMX
// The kernel saves tiles for those processes alone that ask for it.
static bool has_amx() {
  constexpr uint32_t kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kInt8)) != (kTile | kInt8))
    return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#endif

const Kernels* find_kernels(const char* isa) {
  if (!std::strcmp(isa, "scalar")) return &kernels_scalar();
#ifdef UNDERSTUDY_X86
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx2") && has_avx2()) return &kernels_avx2();
  if (!std::strcmp(isa, "avxvnni") && has_avxvnni()) return &kernels_avxvnni();
  if (!std::strcmp(isa, "avx512vnni") && has_avx512vnni()) return &kernels_avx512vnni();
#ifdef UNDERSTUDY_AMX
  if (!std::strcmp(isa, "amx") && has_amx()) return &kernels_amx();
#endif
#endif
  return nullptr;
}

}  // namespace understudy
