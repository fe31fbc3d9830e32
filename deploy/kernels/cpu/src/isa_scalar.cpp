#include "simd_scalar.h"

#include "kernels.inl"

namespace understudy {

const Kernels& kernels_scalar() { return kTable; }

}  // namespace understudy
