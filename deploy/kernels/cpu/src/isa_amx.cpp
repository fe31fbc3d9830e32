// AVX-512-VNNI, with AMX for products of several rows whose inputs have one scale a row.
#include "simd_avx512vnni.h"

#include "kernels.inl"

namespace {
#include "tiles.inl"
}  // namespace

namespace understudy {

const Kernels& kernels_amx() { return kTilesTable; }

}  // namespace understudy
