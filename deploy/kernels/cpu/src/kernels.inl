// The operations of docs/numerics.md, written once over sixteen lanes. Included by one translation unit per
// instruction set after the simd_*.h that defines Floats, Ints and dot_group; everything is static there.

#include "kernels.h"

namespace {

using namespace understudy;

// ---- exp and log -----------------------------------------------------------------------------------------------

inline Floats exp_lanes(Floats x) {
  const Floats lowest = set1(-87.3f), highest = set1(88.0f);
  Floats inside = select_less(x, lowest, lowest, x);
  inside = select_less(highest, inside, highest, inside);
  const Ints n = round_to_ints(mul(inside, set1(1.44269504f)));
  Floats r = fma(to_floats(n), set1(-0.693359375f), inside);
  r = fma(to_floats(n), set1(2.12194440e-4f), r);
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  const Floats value = mul(p, pow2(n));
  const Floats above = select_less(highest, x, set1(__builtin_inff()), value);
  return select_less(x, lowest, set1(0.0f), above);
}

inline float exp_one(float x) { return first_lane(exp_lanes(set1(x))); }

// Positive normal numbers only.
inline Floats log_lanes(Floats x) {
  const Ints bits = bits_of(x);
  const Floats mantissa = floats_of_bits(mask_or(bits, 0x007FFFFF, 0x3F000000));
  const Floats exponent = to_floats(add_ints(shift_right(bits, 23), -126));
  const Floats half = set1(0.707106781186547524f), one = set1(1.0f);
  const Floats e = select_less(mantissa, half, sub(exponent, one), exponent);
  const Floats m = sub(select_less(mantissa, half, add(mantissa, mantissa), mantissa), one);
  const Floats z = mul(m, m);
  Floats p = set1(7.0376836292e-2f);
  p = fma(p, m, set1(-1.1514610310e-1f));
  p = fma(p, m, set1(1.1676998740e-1f));
  p = fma(p, m, set1(-1.2420140846e-1f));
  p = fma(p, m, set1(1.4249322787e-1f));
  p = fma(p, m, set1(-1.6668057665e-1f));
  p = fma(p, m, set1(2.0000714765e-1f));
  p = fma(p, m, set1(-2.4999993993e-1f));
  p = fma(p, m, set1(3.3333331174e-1f));
  Floats y = mul(mul(p, m), z);
  y = fma(e, set1(-2.12194440e-4f), y);
  y = fma(set1(-0.5f), z, y);
  return fma(e, set1(0.693359375f), add(m, y));
}

inline Floats negate(Floats a) { return mul(a, set1(-1.0f)); }

inline Floats silu(Floats x) { return div(x, add(set1(1.0f), exp_lanes(negate(x)))); }

// ---- linear layers ---------------------------------------------------------------------------------------------

inline Floats load_number(const uint8_t* p, int32_t index, Number number) {
  switch (number) {
    case Number::kFloat16:
      return load_half(reinterpret_cast<const uint16_t*>(p) + index);
    case Number::kBFloat16:
      return load_bf16(reinterpret_cast<const uint16_t*>(p) + index);
    default:
      return load(reinterpret_cast<const float*>(p) + index);
  }
}

// Memory to fetch before it is needed: from `at` to `end`, then from `next`. Without this a core reads at half speed.
struct Ahead {
  const uint8_t* at;
  const uint8_t* end;
  const uint8_t* next;

  template <int LINES>
  void fetch() {
    if (at >= end) {
      at = next;
      end = next + (1 << 20);
    }
#pragma GCC unroll 18
    for (int i = 0; i < LINES; ++i) prefetch(at + 64 * i);
    at += 64 * LINES;
  }
};

// Cache lines of a tile per group of inputs, and how many of them are fetched while scales are decoded.
constexpr int ahead_lines(int bits) { return bits == 4 ? 10 : 18; }
constexpr int kLinesWhileDecoding = 4;

// Scales and negated minima of `count` groups from `first`, as floats [group][32].
template <Number NUMBER, Minimum MINIMUM>
inline void decode(const MatrixView& w, const uint8_t* tile, int32_t first, int32_t count, float* scale, float* lowered,
                   Ahead& ahead) {
  const int32_t repeat = 1 << w.group_shift;
  for (int32_t g = 0; g < count; g += repeat) {
    for (int32_t i = 0; i < repeat; ++i) ahead.fetch<kLinesWhileDecoding>();
    const int32_t column = ((first + g) >> w.group_shift) * kTile;
    for (int t = 0; t < 2; ++t) {
      const Floats s = load_number(tile, column + 16 * t, NUMBER);
      Floats m = set1(0.0f);
      if (MINIMUM == Minimum::kZeroPoint) m = mul(load_u8(tile + w.minimum_offset + column + 16 * t), s);
      if (MINIMUM == Minimum::kNumber) m = negate(load_number(tile + w.minimum_offset, column + 16 * t, NUMBER));
      for (int32_t i = g; i < g + repeat && i < count; ++i) {
        store(scale + kTile * i + 16 * t, s);
        if (MINIMUM != Minimum::kNone) store(lowered + kTile * i + 16 * t, m);
      }
    }
  }
}

template <Number NUMBER>
inline void decode_number(const MatrixView& w, const uint8_t* tile, int32_t first, int32_t count, float* s, float* m,
                          Ahead& ahead) {
  if (w.minimum == Minimum::kZeroPoint) return decode<NUMBER, Minimum::kZeroPoint>(w, tile, first, count, s, m, ahead);
  decode<NUMBER, Minimum::kNumber>(w, tile, first, count, s, m, ahead);
}

void decode_panel(const MatrixView& w, const uint8_t* tile, int32_t first, int32_t count, float* s, float* m,
                  Ahead& ahead) {
  if (w.scale_number == Number::kFloat16) return decode_number<Number::kFloat16>(w, tile, first, count, s, m, ahead);
  if (w.scale_number == Number::kBFloat16) return decode_number<Number::kBFloat16>(w, tile, first, count, s, m, ahead);
  decode_number<Number::kFloat32>(w, tile, first, count, s, m, ahead);
}

struct Panel {
  const uint8_t* codes;
  const float* scale;
  const float* lowered;  // −minimum
  const int8_t* inputs;
  const float* input_scale;
  const float* input_offset;
  const int32_t* input_start;
  float* sums;
  int32_t groups;
  bool is_first;
  Ahead ahead;
};

// Signed codes come without minima, unsigned ones with them.
template <int BITS, bool SIGNED, bool AHEAD, int R>
void run_panel(const Panel& p) {
  constexpr int kCodeBytes = BITS == 4 ? 512 : 1024;
  constexpr int kLines = ahead_lines(BITS) - (SIGNED ? 0 : kLinesWhileDecoding);
  Floats sums[2][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) sums[t][r] = p.is_first ? set1(0.0f) : load(p.sums + kTile * r + 16 * t);
  const uint8_t* codes = p.codes;
  const int8_t* inputs = p.inputs;
  const float *scale = p.scale, *lowered = p.lowered, *input_scale = p.input_scale, *offset = p.input_offset;
  const int32_t* start = p.input_start;
  Ahead ahead = p.ahead;
  for (int32_t g = 0; g < p.groups; ++g) {
    if (AHEAD) ahead.fetch<kLines>();
    Ints dots[2][R];
    dot_group<BITS, SIGNED, R>(codes, inputs, start, dots);
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const Floats s = load(scale + 16 * t);
      const Floats m = SIGNED ? s : load(lowered + 16 * t);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[t][r] = fma(mul(to_floats(dots[t][r]), set1(input_scale[r])), s, sums[t][r]);
        if (!SIGNED) sums[t][r] = fma(set1(offset[r]), m, sums[t][r]);
      }
    }
    codes += kCodeBytes;
    inputs += kGroup * R;
    scale += kTile;
    lowered += kTile;
    input_scale += R;
    offset += R;
    start += R;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) store(p.sums + kTile * r + 16 * t, sums[t][r]);
}

using RunPanel = void (*)(const Panel&);

template <int BITS, bool SIGNED, bool AHEAD>
RunPanel panel_for_rows(int32_t rows) {
  static const RunPanel table[kMaxBlock] = {
      run_panel<BITS, SIGNED, AHEAD, 1>, run_panel<BITS, SIGNED, AHEAD, 2>,
      run_panel<BITS, SIGNED, AHEAD, 3>, run_panel<BITS, SIGNED, AHEAD, 4>,
      run_panel<BITS, SIGNED, AHEAD, 5>, run_panel<BITS, SIGNED, AHEAD, 6>,
  };
  return table[rows - 1];
}

template <bool AHEAD>
RunPanel choose_panel(const MatrixView& w, int32_t rows) {
  if (w.bits == 4) return panel_for_rows<4, false, AHEAD>(rows);
  return w.is_signed ? panel_for_rows<8, true, AHEAD>(rows) : panel_for_rows<8, false, AHEAD>(rows);
}

constexpr int kPrefetchDistance = 6144;  // bytes

void matmul_tile(const MatrixView& w, int32_t index, const Inputs& in, float* sums, float* scratch,
                 const uint8_t* next) {
  const uint8_t* tile = w.tile(index);
  const int32_t blocks = num_blocks(in.rows), code_bytes = 4 * kGroup * w.bits;
  float* lowered = scratch + kPanel * kTile;
  Ahead ahead = {tile, tile + w.tile_bytes, next};
  for (int32_t first = 0; first < w.groups; first += kPanel) {
    const int32_t count = w.groups - first < kPanel ? w.groups - first : kPanel;
    ahead.at = tile + static_cast<size_t>(first) * 64 * ahead_lines(w.bits) + kPrefetchDistance;
    const float* scale = reinterpret_cast<const float*>(tile) + first * kTile;
    if (!w.is_signed) {
      decode_panel(w, tile, first, count, scratch, lowered, ahead);
      scale = scratch;
    }
    const uint8_t* codes = tile + w.code_offset + static_cast<size_t>(first) * code_bytes;
    for (int32_t b = 0; b < blocks; ++b) {
      const RowBlock block = block_at(in.rows, b);
      const size_t group = static_cast<size_t>(block.first) * in.groups + static_cast<size_t>(first) * block.count;
      const Panel panel = {codes,
                           scale,
                           lowered,
                           in.codes + group * kGroup,
                           in.scale + group,
                           in.offset + group,
                           in.start + group,
                           sums + static_cast<size_t>(block.first) * kTile,
                           count,
                           first == 0,
                           ahead};
      (b == 0 ? choose_panel<true>(w, block.count) : choose_panel<false>(w, block.count))(panel);
    }
  }
}

void finish_store(const float* sums, int32_t rows, int32_t count, const float* bias, float* y, size_t stride) {
  for (int32_t r = 0; r < rows; ++r, sums += kTile, y += stride) {
    if (count < kTile) {
      for (int32_t i = 0; i < count; ++i) y[i] = bias ? sums[i] + bias[i] : sums[i];
      continue;
    }
    for (int t = 0; t < kTile; t += 16) store(y + t, bias ? add(load(sums + t), load(bias + t)) : load(sums + t));
  }
}

void finish_add(const float* sums, int32_t rows, int32_t count, const float* bias, float* y, size_t stride) {
  for (int32_t r = 0; r < rows; ++r, sums += kTile, y += stride) {
    if (count < kTile) {
      for (int32_t i = 0; i < count; ++i) y[i] = y[i] + (bias ? sums[i] + bias[i] : sums[i]);
      continue;
    }
    for (int t = 0; t < kTile; t += 16) {
      const Floats sum = bias ? add(load(sums + t), load(bias + t)) : load(sums + t);
      store(y + t, add(load(y + t), sum));
    }
  }
}

// ---- quantizing activations ------------------------------------------------------------------------------------

struct GroupScale {
  float scale, inverse;
};

inline GroupScale scale_of(float absmax, float qmax) {
  if (absmax < 0x1p-100f) return {0.0f, 0.0f};
  return {absmax / qmax, qmax / absmax};
}

inline GroupScale group_scale(float absmax) { return scale_of(absmax, 127.0f); }

// One group of one row. `slot`: its index in the arrays of `out`.
inline void write_group(Floats low, Floats high, GroupScale s, const Inputs& out, size_t slot) {
  const Ints a = round_to_ints(mul(low, set1(s.inverse))), b = round_to_ints(mul(high, set1(s.inverse)));
  store_i8(out.codes + slot * kGroup, a);
  store_i8(out.codes + slot * kGroup + 16, b);
  const int32_t total = sum_ints(a, b);
  out.scale[slot] = s.scale;
  out.offset[slot] = -(s.scale * static_cast<float>(total));
  out.start[slot] = -128 * total;
}

inline size_t slot_of(const Inputs& in, int32_t row, int32_t group) {
  const RowBlock block = block_of(in.rows, row);
  return static_cast<size_t>(block.first) * in.groups + static_cast<size_t>(group) * block.count + (row - block.first);
}

inline float norm_factor(const float* x, int32_t n, float eps) {
  Floats lanes = set1(0.0f);
  for (int32_t i = 0; i < n; i += 16) {
    const Floats v = load(x + i);
    lanes = fma(v, v, lanes);
  }
  const float mean = sum_lanes(lanes) / static_cast<float>(n);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

void rms_norm(const float* x, const float* weight, int32_t n, float eps, float* y) {
  const Floats factor = set1(norm_factor(x, n, eps));
  for (int32_t i = 0; i < n; i += 16) store(y + i, mul(mul(load(x + i), factor), load(weight + i)));
}

void quantize(const float* x, const float* weight, float eps, const Inputs& out, int32_t row, float* scratch) {
  const int32_t n = out.groups * kGroup;
  if (weight) {
    rms_norm(x, weight, n, eps, scratch);
    x = scratch;
  }
  const RowBlock block = block_of(out.rows, row);
  size_t slot = slot_of(out, row, 0);
  for (int32_t g = 0; g < out.groups; ++g, slot += block.count) {
    const Floats low = load(x + kGroup * g), high = load(x + kGroup * g + 16);
    write_group(low, high, group_scale(max_lanes(max(abs(low), abs(high)))), out, slot);
  }
}

void finish_silu(const float* gate, const float* up, int32_t rows, const Inputs& out, int32_t group) {
  for (int32_t r = 0; r < rows; ++r, gate += kTile, up += kTile) {
    const Floats low = mul(silu(load(gate)), load(up)), high = mul(silu(load(gate + 16)), load(up + 16));
    const GroupScale s = group_scale(max_lanes(max(abs(low), abs(high))));
    write_group(low, high, s, out, slot_of(out, r, group));
  }
}

void quantize_weights(const float* x, int32_t n, int8_t* codes, float* scale) {
  for (int32_t g = 0; g < n / kGroup; ++g, x += kGroup, codes += kGroup) {
    const Floats low = load(x), high = load(x + 16);
    const GroupScale s = group_scale(max_lanes(max(abs(low), abs(high))));
    store_i8(codes, round_to_ints(mul(low, set1(s.inverse))));
    store_i8(codes + 16, round_to_ints(mul(high, set1(s.inverse))));
    scale[g] = s.scale;
  }
}

void quantize_weights4(const float* x, int32_t n, uint8_t* codes, uint16_t* scale, uint16_t* minimum) {
  for (int32_t g = 0; g < n / kGroup; ++g, x += kGroup, codes += kGroup) {
    const Floats low = load(x), high = load(x + 16);
    const float most = max_lanes(max(low, high)), least = -max_lanes(max(negate(low), negate(high)));
    uint16_t halves[16];
    store_half(halves, set1((most - least) / 15.0f));
    const Floats s = load_half(halves);
    scale[g] = halves[0];
    store_half(halves, set1(least));
    const Floats m = load_half(halves);
    minimum[g] = halves[0];
    const bool is_flat = first_lane(s) == 0.0f;
    int8_t rounded[kGroup];
    store_i8(rounded, clamp_ints(round_to_ints(div(sub(low, m), s)), 0, 15));
    store_i8(rounded + 16, clamp_ints(round_to_ints(div(sub(high, m), s)), 0, 15));
    for (int k = 0; k < kGroup; ++k) codes[k] = is_flat ? 0 : static_cast<uint8_t>(rounded[k]);
  }
}

#include "row_scales.inl"

// ---- embedding -------------------------------------------------------------------------------------------------

void embed(const MatrixView& w, int32_t row, float* y) {
  const uint8_t* tile = w.tile(row / kTile);
  const int32_t column = row % kTile;
  const float* scale = reinterpret_cast<const float*>(tile) + column;
  const uint8_t* codes = tile + w.code_offset + 512 * (column / 16) + 4 * (column % 16);
  for (int32_t g = 0; g < w.groups; ++g, codes += 1024, scale += kTile)
    for (int k = 0; k < kGroup; ++k) y[kGroup * g + k] = static_cast<float>(codes[64 * (k / 4) + k % 4] - 128) * *scale;
}

void to_float32(const void* from, Number number, int32_t n, float* to) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) store(to + i, load_number(bytes, i, number));
  if (i == n) return;
  const size_t size = number == Number::kFloat32 ? 4 : 2;
  float padded[16] = {}, lanes[16];
  __builtin_memcpy(padded, bytes + size * i, size * (n - i));
  store(lanes, load_number(reinterpret_cast<const uint8_t*>(padded), 0, number));
  __builtin_memcpy(to + i, lanes, sizeof(float) * (n - i));
}

// ---- attention -------------------------------------------------------------------------------------------------

void rotate(float* x, const float* cosine, const float* sine, int32_t head_dim) {
  const int32_t half = head_dim / 2;
  int32_t j = 0;
  for (; j + 16 <= half; j += 16) {
    const Floats first = load(x + j), second = load(x + half + j), c = load(cosine + j), s = load(sine + j);
    store(x + j, sub(mul(first, c), mul(second, s)));
    store(x + half + j, add(mul(second, c), mul(first, s)));
  }
  for (; j < half; ++j) {
    const float first = x[j], second = x[half + j];
    x[j] = first * cosine[j] - second * sine[j];
    x[half + j] = second * cosine[j] + first * sine[j];
  }
}

void to_half(const float* x, uint16_t* y, int32_t n) {
  for (int32_t i = 0; i < n; i += 16) store_half(y + i, load(x + i));
}

void widen(const uint16_t* const* rows, int32_t count, int32_t n, const uint16_t* next, float* to) {
  for (int32_t p = 0; p < count; ++p) {
    if (next)
      for (int32_t i = 0; i < n; i += 32) prefetch(next + p * n + i);
    for (int32_t i = 0; i < n; i += 16) store(to + i * kKeyBlock + 16 * p, load_half(rows[p] + i));
  }
}

// Scores of sixteen positions.
inline Floats score_sixteen(const float* q, const float* keys, int32_t head_dim) {
  Floats lanes[16];
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) lanes[p] = set1(0.0f);
  for (int32_t i = 0; i < head_dim; i += 16, keys += 16 * kKeyBlock) {
    const Floats part = load(q + i);
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) lanes[p] = fma(part, load(keys + 16 * p), lanes[p]);
  }
  return sum_lanes_of_16(lanes);
}

// In order of p, for H heads and V vectors of 16 dimensions: output[h][d] = fma(weight[h][p], value[p][d], …), and
// total[h] = total[h] + weight[h][p] where totals are asked for.
template <int H, int V>
void accumulate(const float* weights, const float* values, int32_t count, int32_t head_dim, float* output,
                float* total) {
  Floats sums[H][V], totals[H];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    totals[h] = set1(total ? total[h] : 0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[h][v] = load(output + h * head_dim + 16 * v);
  }
  for (int32_t p = 0; p < count; ++p) {
    Floats value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load(values + 16 * (v * kKeyBlock + p));
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Floats weight = set1(weights[h * kKeyBlock + p]);
      totals[h] = add(totals[h], weight);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[h][v] = fma(weight, value[v], sums[h][v]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    if (total) total[h] = first_lane(totals[h]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(output + h * head_dim + 16 * v, sums[h][v]);
  }
}

using Accumulate = void (*)(const float*, const float*, int32_t, int32_t, float*, float*);

Accumulate choose_accumulate(int32_t heads, int32_t vectors) {
  static const Accumulate table[4][4] = {
      {accumulate<1, 1>, accumulate<1, 2>, accumulate<1, 3>, accumulate<1, 4>},
      {accumulate<2, 1>, accumulate<2, 2>, accumulate<2, 3>, accumulate<2, 4>},
      {accumulate<3, 1>, accumulate<3, 2>, accumulate<3, 3>, accumulate<3, 4>},
      {accumulate<4, 1>, accumulate<4, 2>, accumulate<4, 3>, accumulate<4, 4>},
  };
  return table[heads - 1][vectors - 1];
}

inline void raise_maximum(const AttentionBlock& a, int32_t head, float found) {
  const float correction = exp_one(a.maximum[head] - found);
  a.maximum[head] = found;
  a.total[head] = a.total[head] * correction;
  float* output = a.output + head * a.head_dim;
  for (int32_t i = 0; i < a.head_dim; i += 16) store(output + i, mul(load(output + i), set1(correction)));
}

// Scores of one head, [32]; −∞ behind the last position.
inline void score(const AttentionBlock& a, const float* q, float* scores) {
  const Floats scale = set1(a.score_scale);
  Floats low = mul(score_sixteen(q, a.keys, a.head_dim), scale), high = set1(-__builtin_inff());
  if (a.count > 16) high = mul(score_sixteen(q, a.keys + 16 * 16, a.head_dim), scale);
  if (a.count < kKeyBlock) {
    low = first_lanes(low, a.count, -__builtin_inff());
    high = first_lanes(high, a.count - 16, -__builtin_inff());
  }
  store(scores, low);
  store(scores + 16, high);
}

// Each step for all heads before the next one: their long chains of dependent instructions then overlap.
void attend(const AttentionBlock& a) {
  for (int32_t h = 0; h < a.heads; ++h) score(a, a.q + h * a.head_dim, a.weights + kKeyBlock * h);
  for (int32_t h = 0; h < a.heads; ++h) {
    const float* scores = a.weights + kKeyBlock * h;
    const float found = max_lanes(max(load(scores), load(scores + 16)));
    if (found > a.maximum[h]) raise_maximum(a, h, found);
  }
  for (int32_t h = 0; h < a.heads; ++h) {
    float* weights = a.weights + kKeyBlock * h;
    const Floats maximum = set1(a.maximum[h]);
    store(weights, exp_lanes(sub(load(weights), maximum)));
    store(weights + 16, exp_lanes(sub(load(weights + 16), maximum)));
  }
  for (int32_t h = 0; h < a.heads; h += 4)
    for (int32_t d = 0; d < a.head_dim; d += 64) {
      const int32_t heads = a.heads - h < 4 ? a.heads - h : 4, rest = a.head_dim - d;
      const auto run = choose_accumulate(heads, rest < 64 ? rest / 16 : 4);
      run(a.weights + kKeyBlock * h, a.values + d * kKeyBlock, a.count, a.head_dim, a.output + h * a.head_dim + d,
          d == 0 ? a.total + h : nullptr);
    }
}

void attend_finish(const AttentionBlock& a, float* out) {
  for (int32_t h = 0; h < a.heads; ++h)
    for (int32_t i = h * a.head_dim; i < (h + 1) * a.head_dim; i += 16)
      store(out + i, div(load(a.output + i), set1(a.total[h])));
}

// ---- sampling --------------------------------------------------------------------------------------------------

inline Floats load_some(const float* x, int32_t count, float rest) {
  float lanes[16];
  for (int32_t i = 0; i < 16; ++i) lanes[i] = i < count ? x[i] : rest;
  return load(lanes);
}

inline Floats load_at(const float* x, int32_t i, int32_t n, float rest) {
  return i + 16 <= n ? load(x + i) : load_some(x + i, n - i, rest);
}

inline void store_at(float* y, int32_t i, int32_t n, Floats value) {
  if (i + 16 <= n) return store(y + i, value);
  float lanes[16];
  store(lanes, value);
  for (int32_t j = i; j < n; ++j) y[j] = lanes[j - i];
}

// Finite numbers stay 0 when multiplied by 0, infinities and NaN become NaN.
Finite find_maximum(const float* x, int32_t n) {
  Floats largest = set1(-__builtin_inff()), zeros = set1(0.0f);
  for (int32_t i = 0; i < n; i += 16) {
    const Floats v = load_at(x, i, n, x[0]);
    largest = max(largest, v);
    zeros = fma(v, set1(0.0f), zeros);
  }
  return {max_lanes(largest), sum_lanes(zeros) == 0.0f};
}

void divide(const float* x, float by, int32_t n, float* y) {
  for (int32_t i = 0; i < n; i += 16) store_at(y, i, n, div(load_at(x, i, n, 0.0f), set1(by)));
}

// Most blocks hold nothing that large, and one comparison tells.
int32_t find_above(const float* x, float lowest, int32_t n, int32_t* indices) {
  constexpr int32_t kBlock = 64;
  int32_t count = 0, i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    const Floats largest = max(max(load(x + i), load(x + i + 16)), max(load(x + i + 32), load(x + i + 48)));
    if (max_lanes(largest) < lowest) continue;
    for (int32_t j = i; j < i + kBlock; ++j) {
      indices[count] = j;
      count += x[j] >= lowest;
    }
  }
  for (; i < n; ++i)
    if (x[i] >= lowest) indices[count++] = i;
  return count;
}

double sum_exp(const float* x, float maximum, int32_t n) {
  double total = 0.0;
  for (int32_t i = 0; i < n; i += 16) {
    float lanes[16];
    store(lanes, exp_lanes(sub(load_at(x, i, n, -__builtin_inff()), set1(maximum))));
    double part[4] = {};
    for (int j = 0; j < 16; ++j) part[j % 4] += lanes[j];
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return total;
}

void exp_difference(const float* x, float maximum, int32_t n, float* y) {
  for (int32_t i = 0; i < n; i += 16) store_at(y, i, n, exp_lanes(sub(load_at(x, i, n, 0.0f), set1(maximum))));
}

float log_one(float x) { return first_lane(log_lanes(set1(x))); }

// Philox4x32-10 of sixteen counters under one key: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC
// 2011). word: the counters, then the output.
inline void philox(Ints (&word)[4], uint64_t key) {
  auto key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
    Ints low0, high0, low1, high1;
    multiply_wide(word[0], 0xD2511F53, low0, high0);
    multiply_wide(word[2], 0xCD9E8D57, low1, high1);
    word[0] = exclusive_or(exclusive_or(high1, word[1]), set1_ints(key0));
    word[1] = low1;
    word[2] = exclusive_or(exclusive_or(high0, word[3]), set1_ints(key1));
    word[3] = low0;
  }
}

// −log(−log(u)), u = ((word >> 9) + 0.5) · 2^-23.
void add_noise(const NoiseKey& key, const int32_t* tokens, int32_t n, float* z) {
  for (int32_t i = 0; i < n; i += 16) {
    const int32_t* block = tokens + i;
    int32_t last[16];
    if (i + 16 > n) {
      for (int j = 0; j < 16; ++j) last[j] = i + j < n ? block[j] : 0;
      block = last;
    }
    Ints word[4] = {shift_right(load_ints(block), 2), set1_ints(key.position),
                    set1_ints(static_cast<uint32_t>(key.sample_index)),
                    set1_ints(static_cast<uint32_t>(key.sample_index >> 32))};
    philox(word, key.seed);
    uint32_t words[4][16], chosen[16];
    for (int j = 0; j < 4; ++j) store_ints(words[j], word[j]);
    for (int j = 0; j < 16; ++j) chosen[j] = words[block[j] & 3][j];
    const Floats top = to_floats(shift_right(load_ints(chosen), 9));
    const Floats u = mul(add(top, set1(0.5f)), set1(0x1p-23f));
    store_at(z, i, n, add(load_at(z, i, n, 0.0f), negate(log_lanes(negate(log_lanes(u))))));
  }
}

// ---- ceilings --------------------------------------------------------------------------------------------------

// Keeps a value from being optimized away.
inline void use(Floats a) {
  float lanes[16];
  store(lanes, a);
  __asm__ volatile("" : : "r"(lanes) : "memory");
}

void measure_read(const uint8_t* data, size_t bytes) {
  Floats a = set1(0.0f), b = a, c = a, d = a;
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    const auto* p = reinterpret_cast<const float*>(data + i);
    prefetch(data + i + 4096);
    prefetch(data + i + 4160);
    prefetch(data + i + 4224);
    prefetch(data + i + 4288);
    a = max(a, load(p));
    b = max(b, load(p + 16));
    c = max(c, load(p + 32));
    d = max(d, load(p + 48));
  }
  use(max(max(a, b), max(c, d)));
}

// A group of eight-bit codes for as many rows as are computed together, over and over, from memory that stays in the
// first cache: 2 · 16 · 32 products a row, and nothing else.
void measure_dot(int64_t rounds) {
  alignas(64) uint8_t codes[1024];
  alignas(64) int8_t inputs[kMaxBlock * kGroup];
  __builtin_memset(codes, 3, sizeof codes);
  __builtin_memset(inputs, 5, sizeof inputs);
  Ints sums[2][kMaxBlock];
  for (int r = 0; r < kMaxBlock; ++r) sums[0][r] = sums[1][r] = set1_ints(0);
  for (int64_t i = 0; i < rounds; ++i) {
    accumulate_group<8, kMaxBlock>(codes, inputs, sums);
    __asm__ volatile("" : : : "memory");  // the next round loads again
  }
  for (int r = 0; r < kMaxBlock; ++r) {
    use(to_floats(sums[0][r]));
    use(to_floats(sums[1][r]));
  }
}

bool wants_tiles(const MatrixView&, int32_t) { return false; }
void begin_rows(int32_t) {}

constexpr Kernels kTable = {
    wants_tiles, begin_rows, matmul_tile, finish_store, finish_add, finish_silu, quantize,
    matmul_tile_rows, quantize_row, store_silu, rms_norm,
    rotate,      to_half,      widen,        attend,     attend_finish, embed,          to_float32,
    quantize_weights, quantize_weights4, find_maximum, divide, find_above, sum_exp, exp_difference, log_one,
    add_noise,
    measure_read, measure_dot, double{kMaxBlock} * kTile * kGroup,
};

}  // namespace
