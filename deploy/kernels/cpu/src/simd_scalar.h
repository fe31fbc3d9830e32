// Sixteen lanes in portable C++: what the other instruction sets must equal, bit for bit.
// Everything is static, so that code compiled for one instruction set never serves another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Floats {
  float v[16];
};
struct Ints {
  int32_t v[16];
};

template <class F>
inline Floats each(F f) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline Floats load(const float* p) {
  Floats r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline Floats set1(float a) {
  return each([=](int) { return a; });
}
inline Floats add(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats sub(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats mul(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats div(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats max(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats min(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats abs(Floats a) {
  return each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
// One rounding even without hardware for it: the C library's fmaf is exact.
inline Floats fma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
  return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
inline Floats to_floats(Ints a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
inline Ints round_to_ints(Floats a) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(__builtin_rintf(a.v[i]));
  return r;
}
inline float float_of_bits(uint32_t bits) {
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
inline uint32_t bits_of_float(float a) {
  uint32_t r;
  std::memcpy(&r, &a, sizeof r);
  return r;
}
inline Floats pow2(Ints n) {
  return each([&](int i) { return float_of_bits(static_cast<uint32_t>(n.v[i] + 127) << 23); });
}
inline Ints load_ints(const void* p) {
  Ints r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline Floats floats_of_bits(Ints a) {
  Floats r;
  std::memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline Ints shift_right(Ints a, int n) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n);
  return r;
}
inline Ints bits_of(Floats a) {
  Ints r;
  std::memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline Ints mask_or(Ints a, int32_t mask, int32_t bits) {
  for (int i = 0; i < 16; ++i) a.v[i] = (a.v[i] & mask) | bits;
  return a;
}
inline Ints add_ints(Ints a, int32_t b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b;
  return a;
}
inline Ints add_ints(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints subtract_ints(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Ints multiply_ints(Ints a, int32_t b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b;
  return a;
}
inline Ints clamp_ints(Ints a, int32_t low, int32_t high) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < low ? low : a.v[i] > high ? high : a.v[i];
  return a;
}
// The 32-bit numbers at `from` that `indices` say.
inline Ints gather_ints(const void* from, Ints indices) {
  Ints r;
  for (int i = 0; i < 16; ++i) std::memcpy(&r.v[i], static_cast<const char*>(from) + 4 * indices.v[i], 4);
  return r;
}
inline Ints set1_ints(uint32_t a) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(a);
  return r;
}
inline Ints exclusive_or(Ints a, Ints b) {
  for (int i = 0; i < 16; ++i) a.v[i] ^= b.v[i];
  return a;
}
inline void store_ints(void* p, Ints a) { std::memcpy(p, a.v, sizeof a.v); }
// Both halves of unsigned products.
inline void multiply_wide(Ints a, uint32_t by, Ints& low, Ints& high) {
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(a.v[i])) * by;
    low.v[i] = static_cast<int32_t>(static_cast<uint32_t>(product));
    high.v[i] = static_cast<int32_t>(static_cast<uint32_t>(product >> 32));
  }
}
// Halving: 8, 4, 2, 1.
inline float sum_lanes(Floats a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
  return a.v[0];
}
inline float max_lanes(Floats a) {
  float r = a.v[0];
  for (int i = 1; i < 16; ++i) r = a.v[i] > r ? a.v[i] : r;
  return r;
}
inline int32_t sum_ints(Ints a, Ints b) {
  int32_t r = 0;
  for (int i = 0; i < 16; ++i) r += a.v[i] + b.v[i];
  return r;
}
inline float first_lane(Floats a) { return a.v[0]; }
// The first `count` lanes, then `rest`.
inline Floats first_lanes(Floats a, int count, float rest) {
  return each([&](int i) { return i < count ? a.v[i] : rest; });
}
inline Floats sum_lanes_of_16(const Floats* a) {
  return each([&](int i) { return sum_lanes(a[i]); });
}
inline float float_of_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t half_of_float(float a) {
  const uint32_t bits = bits_of_float(a);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Subnormal halves are multiples of 2^-24.
    const float units = __builtin_rintf(float_of_bits(magnitude) * 0x1p24f);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(units));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}
inline Floats load_half(const uint16_t* p) {
  return each([&](int i) { return float_of_half(p[i]); });
}
inline void store_half(uint16_t* p, Floats a) {
  for (int i = 0; i < 16; ++i) p[i] = half_of_float(a.v[i]);
}
inline Floats load_bf16(const uint16_t* p) {
  return each([&](int i) { return float_of_bits(static_cast<uint32_t>(p[i]) << 16); });
}
inline Floats load_u8(const uint8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline void store_i8(int8_t* p, Ints a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline Floats square_root(Floats a) {
  return each([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// What is subtracted from 8-bit codes before `accumulate_group` multiplies them.
constexpr int32_t kByteOffset = 0;

// Adds the integer dots of one group of 32 inputs with codes − ZERO: 2 × 16 outputs, R rows. See matrix.h for the
// layout of the codes.
template <int BITS, int ZERO, int R>
inline void accumulate_shifted(const uint8_t* codes, const int8_t* inputs, Ints (&d)[2][R]) {
  for (int t = 0; t < 2; ++t)
    for (int r = 0; r < R; ++r) {
      int32_t* sums = d[t][r].v;
      for (int j = 0; j < 8; ++j) {
        // Four inputs of every output; 4-bit codes come in pairs of such fours.
        const int8_t* a = inputs + 32 * r + 4 * j;
        const uint8_t* w = codes + (BITS == 4 ? 256 * t + 64 * (j / 2) : 512 * t + 64 * j);
        const int shift = BITS == 4 ? 4 * (j % 2) : 0, mask = BITS == 4 ? 15 : 255;
        for (int c = 0; c < 16; ++c, w += 4)
          sums[c] += ((w[0] >> shift & mask) - ZERO) * a[0] + ((w[1] >> shift & mask) - ZERO) * a[1] +
                     ((w[2] >> shift & mask) - ZERO) * a[2] + ((w[3] >> shift & mask) - ZERO) * a[3];
      }
    }
}

template <int BITS, int R>
inline void accumulate_group(const uint8_t* codes, const int8_t* inputs, Ints (&d)[2][R]) {
  accumulate_shifted<BITS, 0, R>(codes, inputs, d);
}

// The dots alone; signed codes are made signed here instead of beginning at the third argument.
template <int BITS, bool SIGNED, int R>
inline void dot_group(const uint8_t* codes, const int8_t* inputs, const int32_t*, Ints (&d)[2][R]) {
  for (int t = 0; t < 2; ++t)
    for (int r = 0; r < R; ++r) d[t][r] = set1_ints(0);
  accumulate_shifted<BITS, SIGNED ? 128 : 0, R>(codes, inputs, d);
}

}  // namespace
