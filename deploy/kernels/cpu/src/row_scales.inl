// Linear layers whose inputs have one scale a row (docs/numerics.md, "Linear layers with whole-row scales"). Included
// by kernels.inl: sums of integers run over a whole weight group, or over all inputs where a weight has a scale per
// output, and the rows' scales come in once, at the end.

// ---- products --------------------------------------------------------------------------------------------------

// Scales of `count` visits of 32 inputs from `first`, as floats [weight group][32], and beside them zero points or
// negated minima.
template <Number NUMBER, Minimum MINIMUM>
inline void decode_groups(const MatrixView& w, const uint8_t* tile, int32_t first, int32_t count, float* scale,
                          float* other, Ahead& ahead) {
  const int32_t repeat = 1 << w.group_shift;
  for (int32_t g = 0; g < count; g += repeat, scale += kTile, other += kTile) {
    for (int32_t i = 0; i < repeat; ++i) ahead.fetch<kLinesWhileDecoding>();
    const int32_t column = ((first + g) >> w.group_shift) * kTile;
    for (int t = 0; t < kTile; t += 16) {
      store(scale + t, load_number(tile, column + t, NUMBER));
      if (MINIMUM == Minimum::kZeroPoint) store(other + t, load_u8(tile + w.minimum_offset + column + t));
      if (MINIMUM == Minimum::kNumber)
        store(other + t, negate(load_number(tile + w.minimum_offset, column + t, NUMBER)));
    }
  }
}

template <Number NUMBER>
inline void decode_groups_of(const MatrixView& w, const uint8_t* tile, int32_t first, int32_t count, float* s, float* o,
                             Ahead& ahead) {
  if (w.minimum == Minimum::kNone) return decode_groups<NUMBER, Minimum::kNone>(w, tile, first, count, s, o, ahead);
  if (w.minimum == Minimum::kNumber) return decode_groups<NUMBER, Minimum::kNumber>(w, tile, first, count, s, o, ahead);
  decode_groups<NUMBER, Minimum::kZeroPoint>(w, tile, first, count, s, o, ahead);
}

void decode_row_panel(const MatrixView& w, const uint8_t* tile, int32_t first, int32_t count, float* s, float* o,
                      Ahead& ahead) {
  if (w.scale_number == Number::kFloat16) return decode_groups_of<Number::kFloat16>(w, tile, first, count, s, o, ahead);
  if (w.scale_number == Number::kBFloat16)
    return decode_groups_of<Number::kBFloat16>(w, tile, first, count, s, o, ahead);
  decode_groups_of<Number::kFloat32>(w, tile, first, count, s, o, ahead);
}

// Groups of inputs of one block of rows. Where the weight has a scale per output, `sums` holds integers.
struct RowPanel {
  const uint8_t* codes;
  const float* scale;
  const float* other;  // zero points or −minima
  const int8_t* inputs;
  const int32_t* totals;
  float* sums;
  int32_t groups, group_shift;
  int32_t start;  // where the dots of a weight group begin, for a total of 1
  bool is_first, is_ahead;
  Ahead ahead;
};

// Nothing but integers.
template <int BITS, int R>
void run_channel_panel(const RowPanel& p) {
  constexpr int kCodeBytes = BITS == 4 ? 512 : 1024;
  Ints sums[2][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) sums[t][r] = p.is_first ? set1_ints(0) : load_ints(p.sums + kTile * r + 16 * t);
  const uint8_t* codes = p.codes;
  const int8_t* inputs = p.inputs;
  Ahead ahead = p.ahead;
  for (int32_t g = 0; g < p.groups; ++g) {
    if (p.is_ahead) ahead.fetch<kCodeBytes / 64>();
    accumulate_group<BITS, R>(codes, inputs, sums);
    codes += kCodeBytes;
    inputs += kGroup * R;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) store_ints(p.sums + kTile * r + 16 * t, sums[t][r]);
}

// One fma for each weight group, and one more for a zero point (exact: all numbers are below 2^24) or a minimum.
template <int BITS, Minimum MINIMUM, int R>
void run_grouped_panel(const RowPanel& p) {
  constexpr int kCodeBytes = BITS == 4 ? 512 : 1024;
  constexpr int kLines = ahead_lines(BITS) - kLinesWhileDecoding;
  Floats sums[2][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) sums[t][r] = p.is_first ? set1(0.0f) : load(p.sums + kTile * r + 16 * t);
  const uint8_t* codes = p.codes;
  const int8_t* inputs = p.inputs;
  const int32_t* totals = p.totals;
  const float *scale = p.scale, *other = p.other;
  const int32_t repeat = 1 << p.group_shift;
  Ahead ahead = p.ahead;
  for (int32_t g = 0; g < p.groups; g += repeat) {
    int32_t total[R];
    Ints dots[2][R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      total[r] = totals[r];
      for (int32_t i = 1; i < repeat; ++i) total[r] += totals[R * i + r];
      dots[0][r] = dots[1][r] = set1_ints(static_cast<uint32_t>(p.start * total[r]));
    }
    for (int32_t i = 0; i < repeat; ++i) {
      if (p.is_ahead) ahead.fetch<kLines>();
      accumulate_group<BITS, R>(codes, inputs, dots);
      codes += kCodeBytes;
      inputs += kGroup * R;
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const Floats s = load(scale + 16 * t);
      const Floats o = MINIMUM == Minimum::kNone ? s : load(other + 16 * t);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Floats lowered = set1(static_cast<float>(-total[r]));
        Floats d = to_floats(dots[t][r]);
        if (MINIMUM == Minimum::kZeroPoint) d = fma(lowered, o, d);
        sums[t][r] = fma(d, s, sums[t][r]);
        if (MINIMUM == Minimum::kNumber) sums[t][r] = fma(lowered, o, sums[t][r]);
      }
    }
    totals += R * repeat;
    scale += kTile;
    other += kTile;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) store(p.sums + kTile * r + 16 * t, sums[t][r]);
}

using RunRowPanel = void (*)(const RowPanel&);

template <int BITS>
RunRowPanel channel_panel_for_rows(int32_t rows) {
  static const RunRowPanel table[kMaxBlock] = {
      run_channel_panel<BITS, 1>, run_channel_panel<BITS, 2>, run_channel_panel<BITS, 3>,
      run_channel_panel<BITS, 4>, run_channel_panel<BITS, 5>, run_channel_panel<BITS, 6>,
  };
  return table[rows - 1];
}

template <int BITS, Minimum MINIMUM>
RunRowPanel grouped_panel_for_rows(int32_t rows) {
  static const RunRowPanel table[kMaxBlock] = {
      run_grouped_panel<BITS, MINIMUM, 1>, run_grouped_panel<BITS, MINIMUM, 2>, run_grouped_panel<BITS, MINIMUM, 3>,
      run_grouped_panel<BITS, MINIMUM, 4>, run_grouped_panel<BITS, MINIMUM, 5>, run_grouped_panel<BITS, MINIMUM, 6>,
  };
  return table[rows - 1];
}

template <int BITS>
RunRowPanel row_panel_of(const MatrixView& w, int32_t rows) {
  if (w.is_channel) return channel_panel_for_rows<BITS>(rows);
  if (w.minimum == Minimum::kNone) return grouped_panel_for_rows<BITS, Minimum::kNone>(rows);
  if (w.minimum == Minimum::kNumber) return grouped_panel_for_rows<BITS, Minimum::kNumber>(rows);
  return grouped_panel_for_rows<BITS, Minimum::kZeroPoint>(rows);
}

// The integers of a weight with a scale per output become floats; every row is multiplied by its scale.
void finish_rows(const MatrixView& w, const uint8_t* tile, const RowInputs& in, float* sums) {
  const int32_t byte_offset = w.bits == 8 ? kByteOffset : 0;
  for (int t = 0; t < kTile; t += 16) {
    Floats scale = set1(0.0f), minimum = scale;
    Ints zero = set1_ints(static_cast<uint32_t>(w.zero - byte_offset));
    if (w.is_channel) scale = load_number(tile, t, w.scale_number);
    if (w.is_channel && w.minimum == Minimum::kNumber) {
      minimum = load_number(tile + w.minimum_offset, t, w.scale_number);
    } else if (w.is_channel && w.minimum == Minimum::kZeroPoint) {
      zero = add_ints(round_to_ints(load_u8(tile + w.minimum_offset + t)), -byte_offset);
    }
    float* sum = sums + t;
    for (int32_t r = 0; r < in.rows; ++r, sum += kTile) {
      Floats acc;
      if (w.is_channel) {
        const Ints dots = subtract_ints(load_ints(sum), multiply_ints(zero, in.total[r]));
        acc = fma(to_floats(dots), scale, set1(0.0f));
        if (w.minimum == Minimum::kNumber) acc = fma(set1(static_cast<float>(in.total[r])), minimum, acc);
      } else {
        acc = load(sum);
      }
      store(sum, mul(acc, set1(in.scale[r])));
    }
  }
}

void matmul_tile_rows(const MatrixView& w, int32_t index, const RowInputs& in, float* sums, float* scratch,
                      const uint8_t* next) {
  const uint8_t* tile = w.tile(index);
  const int32_t blocks = num_blocks(in.rows), code_bytes = 4 * kGroup * w.bits;
  const int32_t lines = w.is_channel ? code_bytes / 64 : ahead_lines(w.bits);
  float* other = scratch + kPanel * kTile;
  RowPanel panel = {};
  panel.scale = scratch;
  panel.other = other;
  panel.group_shift = w.group_shift;
  panel.start = (w.bits == 8 ? kByteOffset : 0) - w.zero;
  panel.ahead = {tile, tile + w.tile_bytes, next};
  for (int32_t first = 0; first < w.groups; first += kPanel) {
    const int32_t count = w.groups - first < kPanel ? w.groups - first : kPanel;
    panel.ahead.at = tile + static_cast<size_t>(first) * 64 * lines + kPrefetchDistance;
    if (!w.is_channel) decode_row_panel(w, tile, first, count, scratch, other, panel.ahead);
    panel.codes = tile + w.code_offset + static_cast<size_t>(first) * code_bytes;
    panel.groups = count;
    panel.is_first = first == 0;
    for (int32_t b = 0; b < blocks; ++b) {
      const RowBlock block = block_at(in.rows, b);
      const size_t group = static_cast<size_t>(block.first) * in.groups + static_cast<size_t>(first) * block.count;
      panel.inputs = in.codes + group * kGroup;
      panel.totals = in.totals + group;
      panel.sums = sums + static_cast<size_t>(block.first) * kTile;
      panel.is_ahead = b == 0;
      (w.bits == 4 ? row_panel_of<4>(w, block.count) : row_panel_of<8>(w, block.count))(panel);
    }
  }
  finish_rows(w, tile, in, sums);
}

// ---- inputs ----------------------------------------------------------------------------------------------------

// Where a row's groups lie: the first one's codes and total, the way from there to the second one's codes and to the
// third one's, so on for every two; and that from each total to the next.
struct RowPlace {
  int8_t* codes;
  int32_t* total;
  ptrdiff_t to_second, to_third, total_step;
};

inline RowPlace place_in_block(const RowInputs& out, int32_t row) {
  const RowBlock block = block_of(out.rows, row);
  const size_t slot = static_cast<size_t>(block.first) * out.groups + (row - block.first);
  return {out.codes + slot * kGroup, out.totals + slot, kGroup * block.count, 2 * kGroup * block.count, block.count};
}

// `codes(i)`: codes i … i + 15 of the row. Returns their sum.
template <class Codes>
inline int32_t write_row(RowPlace to, int32_t groups, Codes codes) {
  int32_t total = 0;
  for (int32_t g = 0; g < groups; ++g, to.total += to.total_step) {
    const Ints a = codes(kGroup * g), b = codes(kGroup * g + 16);
    int8_t* at = to.codes + g / 2 * to.to_third + g % 2 * to.to_second;
    store_i8(at, a);
    store_i8(at + 16, b);
    *to.total = sum_ints(a, b);
    total += *to.total;
  }
  return total;
}

inline Floats clamp(Floats x, float limit) { return min(max(x, set1(-limit)), set1(limit)); }

inline float absmax_of(const float* x, int32_t n) {
  Floats largest = set1(0.0f);
  for (int32_t i = 0; i < n; i += 16) largest = max(largest, abs(load(x + i)));
  return max_lanes(largest);
}

void quantize_row_to(const RowPlace& to, const float* x, const float* weight, float eps, const InputGrid& grid,
                     const RowInputs& out, int32_t row, float* scratch) {
  if (weight) {
    rms_norm(x, weight, grid.channels, eps, scratch);
    x = scratch;
  }
  const auto qmax = static_cast<float>(grid.qmax);
  GroupScale s = {grid.scale, 1.0f / grid.scale};
  if (grid.scale == 0.0f) s = scale_of(absmax_of(x, grid.channels), qmax);
  out.scale[row] = s.scale;
  const Floats inverse = set1(s.inverse);
  // A row's own scale needs no clamp, unless what is in it are not numbers: codes fit their grid all the same.
  if (!grid.flatten) {
    const auto codes = [=](int32_t i) { return round_to_ints(clamp(mul(load(x + i), inverse), qmax)); };
    out.total[row] = write_row(to, out.groups, codes);
    return;
  }
  // In place: every number is read before its code is written.
  for (int32_t i = 0; i < grid.channels; i += 16)
    store_ints(scratch + i, round_to_ints(clamp(mul(load(x + i), inverse), 0x1p23f)));
  out.total[row] = write_row(to, out.groups, [&](int32_t i) {
    const Ints code = gather_ints(scratch, load_ints(grid.flatten + i)), offset = load_ints(grid.offset + i);
    return add_ints(clamp_ints(subtract_ints(code, offset), 0, grid.qmax),
                    clamp_ints(add_ints(code, offset), -grid.qmax, 0));
  });
}

void quantize_row(const float* x, const float* weight, float eps, const InputGrid& grid, const RowInputs& out,
                  int32_t row, float* scratch) {
  quantize_row_to(place_in_block(out, row), x, weight, eps, grid, out, row, scratch);
}

void store_silu(const float* gate, const float* up, int32_t rows, float* y, size_t stride) {
  for (int32_t r = 0; r < rows; ++r, gate += kTile, up += kTile, y += stride)
    for (int t = 0; t < kTile; t += 16) store(y + t, mul(silu(load(gate + t)), load(up + t)));
}
