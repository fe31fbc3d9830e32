// Sixteen lanes as two 256-bit registers; needs avx2, fma and f16c, and uses AVX-VNNI where it is compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// The compiler's own limits would leave these as calls in some of the many places that use them.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace {

struct Floats {
  __m256 lo, hi;
};
struct Ints {
  __m256i lo, hi;
};

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Floats set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline Ints round_to_ints(Floats a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline Floats floats_of_bits(Ints a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline Ints bits_of(Floats a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline Ints add_ints(Ints a, int32_t b) {
  const __m256i all = _mm256_set1_epi32(b);
  return {_mm256_add_epi32(a.lo, all), _mm256_add_epi32(a.hi, all)};
}
inline Ints add_ints(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline Ints subtract_ints(Ints a, Ints b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline Ints multiply_ints(Ints a, int32_t b) {
  const __m256i all = _mm256_set1_epi32(b);
  return {_mm256_mullo_epi32(a.lo, all), _mm256_mullo_epi32(a.hi, all)};
}
inline Ints clamp_ints(Ints a, int32_t low, int32_t high) {
  const __m256i least = _mm256_set1_epi32(low), most = _mm256_set1_epi32(high);
  return {_mm256_min_epi32(_mm256_max_epi32(a.lo, least), most), _mm256_min_epi32(_mm256_max_epi32(a.hi, least), most)};
}
// The 32-bit numbers at `from` that `indices` say.
inline Ints gather_ints(const void* from, Ints indices) {
  const auto* base = static_cast<const int*>(from);
  return {_mm256_i32gather_epi32(base, indices.lo, 4), _mm256_i32gather_epi32(base, indices.hi, 4)};
}
inline Ints set1_ints(uint32_t a) {
  const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(a));
  return {all, all};
}
inline Ints exclusive_or(Ints a, Ints b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
inline void store_ints(void* p, Ints a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, a.hi);
}
// Both halves of unsigned products.
inline void multiply_wide(__m256i a, __m256i by, __m256i& low, __m256i& high) {
  const __m256i even = _mm256_mul_epu32(a, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), by);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
inline void multiply_wide(Ints a, uint32_t by, Ints& low, Ints& high) {
  const Ints factor = set1_ints(by);
  multiply_wide(a.lo, factor.lo, low.lo, high.lo);
  multiply_wide(a.hi, factor.hi, low.hi, high.hi);
}
inline Floats pow2(Ints n) {
  const Ints biased = add_ints(n, 127);
  return floats_of_bits({_mm256_slli_epi32(biased.lo, 23), _mm256_slli_epi32(biased.hi, 23)});
}
inline Ints load_ints(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
inline Ints shift_right(Ints a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
}
inline Ints mask_or(Ints a, int32_t mask, int32_t bits) {
  const __m256i m = _mm256_set1_epi32(mask), b = _mm256_set1_epi32(bits);
  return {_mm256_or_si256(_mm256_and_si256(a.lo, m), b), _mm256_or_si256(_mm256_and_si256(a.hi, m), b)};
}

// Halving: 8, 4, 2, 1.
inline float sum_lanes(Floats a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Floats a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t sum_ints(Ints a, Ints b) {
  const __m256i eight = _mm256_add_epi32(_mm256_add_epi32(a.lo, a.hi), _mm256_add_epi32(b.lo, b.hi));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1))));
}
inline float first_lane(Floats a) { return _mm256_cvtss_f32(a.lo); }
// The first `count` lanes, then `rest`.
inline Floats first_lanes(Floats a, int count, float rest) {
  float lanes[16];
  store(lanes, a);
  for (int i = count < 0 ? 0 : count; i < 16; ++i) lanes[i] = rest;
  return load(lanes);
}
inline Floats sum_lanes_of_16(const Floats* a) {
  float sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = sum_lanes(a[i]);
  return load(sums);
}

inline Floats load_half(const uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline void store_half(uint16_t* p, Floats a) {
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats load_bf16(const uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return floats_of_bits({_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16),
                         _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16)});
}
inline Floats load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return to_floats({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}
inline void store_i8(int8_t* p, Ints a) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), _MM_SHUFFLE(3, 1, 2, 0));
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline Floats square_root(Floats a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline __m256i broadcast_inputs(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

#ifdef __AVXVNNI__

// What is subtracted from 8-bit codes before they are multiplied.
constexpr int32_t kByteOffset = 0;

// Adds 8 outputs × R rows of one group; `w` points at the first of the group's vectors, 64 bytes apart.
template <int BITS, int R>
ALWAYS_INLINE void accumulate_eight(const uint8_t* w, const int8_t* inputs, __m256i (&d)[R]) {
  const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int j = 0; j < (BITS == 4 ? 4 : 8); ++j) {
    const __m256i codes = load256(w + 64 * j);
    if (BITS == 8) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        d[r] = _mm256_dpbusd_avx_epi32(d[r], codes, broadcast_inputs(inputs + 32 * r + 4 * j));
      continue;
    }
    const __m256i even = _mm256_and_si256(codes, low), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      d[r] = _mm256_dpbusd_avx_epi32(d[r], even, broadcast_inputs(inputs + 32 * r + 8 * j));
      d[r] = _mm256_dpbusd_avx_epi32(d[r], odd, broadcast_inputs(inputs + 32 * r + 8 * j + 4));
    }
  }
}

// Without rows to add to; with signed codes they begin at `start`.
template <int BITS, bool SIGNED, int R>
ALWAYS_INLINE void dot_eight(const uint8_t* w, const int8_t* inputs, const int32_t* start, __m256i (&d)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) d[r] = SIGNED ? _mm256_set1_epi32(start[r]) : _mm256_setzero_si256();
  accumulate_eight<BITS, R>(w, inputs, d);
}

#else

// vpmaddubsw saturates at 16 bits. With 4-bit codes eight of its results fit: 8 · 2 · 15 · 127 = 30480. With 8-bit
// codes made signed and their sign moved to the input one does: 2 · 128 · 127 = 32512.
constexpr int32_t kByteOffset = 128;

template <int BITS, int R>
ALWAYS_INLINE void accumulate_eight(const uint8_t* w, const int8_t* inputs, __m256i (&d)[R]) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i sums[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = BITS == 4 ? _mm256_setzero_si256() : d[r];
#pragma GCC unroll 8
  for (int j = 0; j < (BITS == 4 ? 4 : 8); ++j) {
    __m256i codes = load256(w + 64 * j);
    if (BITS == 8) {
      codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
      const __m256i magnitude = _mm256_abs_epi8(codes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i a = _mm256_sign_epi8(broadcast_inputs(inputs + 32 * r + 4 * j), codes);
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, a), ones));
      }
      continue;
    }
    const __m256i even = _mm256_and_si256(codes, low), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i x = _mm256_maddubs_epi16(even, broadcast_inputs(inputs + 32 * r + 8 * j));
      const __m256i y = _mm256_maddubs_epi16(odd, broadcast_inputs(inputs + 32 * r + 8 * j + 4));
      sums[r] = _mm256_add_epi16(sums[r], _mm256_add_epi16(x, y));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) d[r] = BITS == 4 ? _mm256_add_epi32(d[r], _mm256_madd_epi16(sums[r], ones)) : sums[r];
}

template <int BITS, bool SIGNED, int R>
ALWAYS_INLINE void dot_eight(const uint8_t* w, const int8_t* inputs, const int32_t* start, __m256i (&d)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) d[r] = BITS == 4 || SIGNED ? _mm256_setzero_si256() : _mm256_set1_epi32(-start[r]);
  accumulate_eight<BITS, R>(w, inputs, d);
}

#endif

// Adds the integer dots of one group of 32 inputs: 2 × 16 outputs, R rows. See matrix.h for the layout of the codes.
template <int BITS, int R>
ALWAYS_INLINE void accumulate_group(const uint8_t* codes, const int8_t* inputs, Ints (&d)[2][R]) {
  for (int t = 0; t < 2; ++t) {
    const uint8_t* w = codes + t * (BITS == 4 ? 256 : 512);
    __m256i lo[R], hi[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      lo[r] = d[t][r].lo;
      hi[r] = d[t][r].hi;
    }
    accumulate_eight<BITS, R>(w, inputs, lo);
    accumulate_eight<BITS, R>(w + 32, inputs, hi);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) d[t][r] = {lo[r], hi[r]};
  }
}

// The dots alone; with signed codes they begin at `start`.
template <int BITS, bool SIGNED, int R>
ALWAYS_INLINE void dot_group(const uint8_t* codes, const int8_t* inputs, const int32_t* start, Ints (&d)[2][R]) {
  for (int t = 0; t < 2; ++t) {
    const uint8_t* w = codes + t * (BITS == 4 ? 256 : 512);
    __m256i lo[R], hi[R];
    dot_eight<BITS, SIGNED, R>(w, inputs, start, lo);
    dot_eight<BITS, SIGNED, R>(w + 32, inputs, start, hi);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) d[t][r] = {lo[r], hi[r]};
  }
}

}  // namespace
