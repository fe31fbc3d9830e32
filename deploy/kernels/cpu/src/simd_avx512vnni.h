// Sixteen lanes as one 512-bit register; needs avx512f, bw, vl and vnni.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// The compiler's own limits would leave these as calls in some of the many places that use them.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace {

using Floats = __m512;
using Ints = __m512i;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline Floats set1(float a) { return _mm512_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints round_to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
inline Floats pow2(Ints n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Floats floats_of_bits(Ints a) { return _mm512_castsi512_ps(a); }
inline Ints bits_of(Floats a) { return _mm512_castps_si512(a); }
inline Ints shift_right(Ints a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
inline Ints mask_or(Ints a, int32_t mask, int32_t bits) {
  return _mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi32(mask)), _mm512_set1_epi32(bits));
}
inline Ints add_ints(Ints a, int32_t b) { return _mm512_add_epi32(a, _mm512_set1_epi32(b)); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints multiply_ints(Ints a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
inline Ints clamp_ints(Ints a, int32_t low, int32_t high) {
  return _mm512_min_epi32(_mm512_max_epi32(a, _mm512_set1_epi32(low)), _mm512_set1_epi32(high));
}
// The 32-bit numbers at `from` that `indices` say.
inline Ints gather_ints(const void* from, Ints indices) { return _mm512_i32gather_epi32(indices, from, 4); }
inline Ints set1_ints(uint32_t a) { return _mm512_set1_epi32(static_cast<int32_t>(a)); }
inline Ints exclusive_or(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline void store_ints(void* p, Ints a) { _mm512_storeu_si512(p, a); }
// Both halves of unsigned products.
inline void multiply_wide(Ints a, uint32_t by, Ints& low, Ints& high) {
  const Ints factor = set1_ints(by);
  const Ints even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}

// Halving: 8, 4, 2, 1.
inline float sum_lanes(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a),
                                     _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Floats a) { return _mm512_reduce_max_ps(a); }
inline int32_t sum_ints(Ints a, Ints b) { return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b)); }

inline float first_lane(Floats a) { return _mm512_cvtss_f32(a); }
// The first `count` lanes, then `rest`.
inline Floats first_lanes(Floats a, int count, float rest) {
  const auto kept = static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  return _mm512_mask_blend_ps(kept, set1(rest), a);
}

// sum_lanes of sixteen vectors at once: each step halves two of them with one addition.
inline Floats sum_lanes_of_16(const Floats* a) {
  Floats b[8], c[4], d[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    b[i] = add(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xEE));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    c[i] = add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xDD));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d even = _mm512_castps_pd(c[2 * i]), odd = _mm512_castps_pd(c[2 * i + 1]);
    d[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  const Floats sums = add(_mm512_shuffle_ps(d[0], d[1], _MM_SHUFFLE(2, 0, 2, 0)),
                          _mm512_shuffle_ps(d[0], d[1], _MM_SHUFFLE(3, 1, 3, 1)));
  const Ints transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(transpose, sums);
}

inline Floats load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_half(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Floats load_u8(const uint8_t* p) {
  return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_i8(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
inline Floats square_root(Floats a) { return _mm512_sqrt_ps(a); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline Ints broadcast_inputs(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// What is subtracted from 8-bit codes before `accumulate_group` multiplies them.
constexpr int32_t kByteOffset = 0;

// Adds the integer dots of one group of 32 inputs: 2 × 16 outputs, R rows. See matrix.h for the layout of the codes.
template <int BITS, int R>
ALWAYS_INLINE void accumulate_group(const uint8_t* codes, const int8_t* inputs, Ints (&d)[2][R]) {
  if (BITS == 4) {
    const Ints low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Ints w0 = load_ints(codes + 64 * j), w1 = load_ints(codes + 256 + 64 * j);
      const Ints even0 = _mm512_and_si512(w0, low), even1 = _mm512_and_si512(w1, low);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Ints a = broadcast_inputs(inputs + 32 * r + 8 * j);
        d[0][r] = _mm512_dpbusd_epi32(d[0][r], even0, a);
        d[1][r] = _mm512_dpbusd_epi32(d[1][r], even1, a);
      }
      const Ints odd0 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), low);
      const Ints odd1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), low);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Ints a = broadcast_inputs(inputs + 32 * r + 8 * j + 4);
        d[0][r] = _mm512_dpbusd_epi32(d[0][r], odd0, a);
        d[1][r] = _mm512_dpbusd_epi32(d[1][r], odd1, a);
      }
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const Ints w0 = load_ints(codes + 64 * j), w1 = load_ints(codes + 512 + 64 * j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Ints a = broadcast_inputs(inputs + 32 * r + 4 * j);
        d[0][r] = _mm512_dpbusd_epi32(d[0][r], w0, a);
        d[1][r] = _mm512_dpbusd_epi32(d[1][r], w1, a);
      }
    }
  }
}

// The dots alone; with signed codes they begin at `start`.
template <int BITS, bool SIGNED, int R>
ALWAYS_INLINE void dot_group(const uint8_t* codes, const int8_t* inputs, const int32_t* start, Ints (&d)[2][R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) d[0][r] = d[1][r] = SIGNED ? _mm512_set1_epi32(start[r]) : _mm512_setzero_si512();
  accumulate_group<BITS, R>(codes, inputs, d);
}

}  // namespace
