#include "simd_avx512vnni.h"

#include "kernels.inl"

namespace understudy {

const Kernels& kernels_avx512vnni() { return kTable; }

}  // namespace understudy
