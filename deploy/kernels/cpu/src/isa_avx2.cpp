#include "simd_avx2.h"

#include "kernels.inl"

namespace understudy {

const Kernels& kernels_avx2() { return kTable; }

}  // namespace understudy
