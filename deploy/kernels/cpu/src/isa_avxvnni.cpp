// AVX2 with the dot product instructions that came back to machines without AVX-512; chosen by the compiler's flags.
#include "simd_avx2.h"

#include "kernels.inl"

namespace understudy {

const Kernels& kernels_avxvnni() { return kTable; }

}  // namespace understudy
