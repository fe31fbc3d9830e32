// Linear layers whose inputs have one scale a row, by Intel's AMX: included by isa_amx.cpp after kernels.inl. An
// instruction multiplies two tiles of up to sixteen rows of 64 bytes, eight times as many products in a cycle as AVX-512's
// dot products. Only integers are summed in tiles, so every result is what row_scales.inl would give.
//
// Layers with inputs in groups of 32 stay with kernels.inl: of theirs tiles can only take the integers of a single group
// at a time, and must store them for floats to go on with. For six rows that took as long as it saved.
//
// The rows are cut into tiles of nearly equal height. A tile's inputs lie in one piece: 64 of every row, the next 64 of
// every row, and so on. What the last tile has too many rows is written behind the sums, and nobody looks at it.

constexpr int kTileRows = 16;
constexpr int kStep = 64;             // inputs of one product
constexpr int kStepBytes = 2 * 1024;  // weights of 32 outputs for it: two tiles
constexpr int kStepsAtOnce = 8;       // whose weights are laid out before they are used, to stay in the first cache
constexpr int kSumPitch = kTile * sizeof(int32_t);

inline int32_t num_row_tiles(int32_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int32_t height_of(int32_t rows) { return (rows + num_row_tiles(rows) - 1) / num_row_tiles(rows); }
inline int32_t num_steps(int32_t groups) { return (groups + 1) / 2; }

// The compiler's intrinsics do not say that they read memory: what was written has to be told apart from them.
inline void finish_writes() { __asm__ volatile("" : : : "memory"); }

// Operand of the instruction that says what shape tiles have.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int32_t height, int32_t bytes) {
    rows[tile] = static_cast<uint8_t>(height);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// Tiles 0 to 3 are sums: of the first tile of rows with outputs 0 … 15 and 16 … 31, and of the second. 4 and 5 are
// inputs, 6 and 7 weights. Where there is one tile of rows, 2, 3 and 5 are inputs and weights of a single group.
void begin_rows_by_tiles(int32_t rows) {
  const int32_t height = height_of(rows);
  TileShapes shapes;
  for (int tile = 0; tile < 6; ++tile) shapes.set(tile, height, 64);
  for (int tile = 6; tile < 8; ++tile) shapes.set(tile, 16, 64);
  if (rows <= kTileRows) {
    shapes.set(2, height, kGroup);
    shapes.set(3, kGroup / 4, 64);
    shapes.set(5, kGroup / 4, 64);
  }
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

// Fewer rows are sooner done than weights are laid out. A group of 32 has half a product's inputs.
bool gains_by_tiles(const MatrixView& w, int32_t rows) {
  return w.is_channel ? rows > kMaxBlock : w.group_shift > 0 && rows > 2 * kMaxBlock;
}

// ---- weights ---------------------------------------------------------------------------------------------------

// The codes of a group become half of the weights of a step.
template <int BITS>
ALWAYS_INLINE void lay_out_group(const uint8_t* codes, uint8_t* to) {
  const Ints low = _mm512_set1_epi8(15);
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t)
#pragma GCC unroll 8
    for (int j = 0; j < 8; j += 8 / BITS) {
      uint8_t* row = to + 1024 * t + 64 * j;
      const Ints found = load_ints(codes + (8 * t + j) * 8 * BITS);
      if (BITS == 8) {
        store_ints(row, found);
      } else {
        store_ints(row, _mm512_and_si512(found, low));
        store_ints(row + 64, _mm512_and_si512(_mm512_srli_epi16(found, 4), low));
      }
    }
}

// Steps of two groups. What would be a second one behind the last is 0.
template <int BITS>
void lay_out_steps(const uint8_t* codes, int32_t count, int32_t lines, Ahead ahead, uint8_t* to) {
  for (int32_t g = 0; g < count; ++g, codes += 4 * kGroup * BITS) {
    for (int32_t i = 0; i < lines; i += 2) ahead.fetch<2>();
    lay_out_group<BITS>(codes, to + kStepBytes * (g / 2) + 512 * (g % 2));
  }
  if (count % 2 == 0) return;
  uint8_t* rest = to + kStepBytes * (count / 2) + 512;
  for (int t = 0; t < 2; ++t)
    for (int j = 0; j < 8; ++j) store_ints(rest + 1024 * t + 64 * j, set1_ints(0));
}

// ---- products --------------------------------------------------------------------------------------------------

// Inputs of TILES tiles of rows times `steps` steps of weights: added to sums [row][32], or in their place. `second`:
// from the first tile's inputs to the second one's, bytes.
template <int TILES>
void multiply_steps(const int8_t* inputs, ptrdiff_t second, int32_t height, const uint8_t* weights, int32_t steps,
                    int32_t* sums, bool is_first) {
  const ptrdiff_t step = kStep * height;
  int32_t* second_sums = sums + height * kTile;
  finish_writes();
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if (TILES == 2) _tile_zero(2);
    if (TILES == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kSumPitch);
    _tile_loadd(1, sums + 16, kSumPitch);
    if (TILES == 2) _tile_loadd(2, second_sums, kSumPitch);
    if (TILES == 2) _tile_loadd(3, second_sums + 16, kSumPitch);
  }
  for (int32_t s = 0; s < steps; ++s, inputs += step, weights += kStepBytes) {
    _tile_loadd(4, inputs, kStep);
    _tile_loadd(6, weights, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, weights + 1024, 64);
    _tile_dpbsud(1, 4, 7);
    if (TILES == 1) continue;
    _tile_loadd(5, inputs + second, kStep);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums, kSumPitch);
  _tile_stored(1, sums + 16, kSumPitch);
  if (TILES == 2) _tile_stored(2, second_sums, kSumPitch);
  if (TILES == 2) _tile_stored(3, second_sums + 16, kSumPitch);
}

// All groups of 8-bit weights, as they lie, times one tile of rows.
void multiply_groups(const int8_t* inputs, int32_t height, const uint8_t* codes, int32_t groups, Ahead ahead,
                     int32_t* sums) {
  finish_writes();
  _tile_zero(0);
  _tile_zero(1);
  for (int32_t g = 0; g < groups; ++g, codes += 1024) {
    ahead.fetch<16>();
    _tile_loadd(2, inputs + g / 2 * kStep * height + g % 2 * kGroup, kStep);
    _tile_loadd(3, codes, 64);
    _tile_dpbsud(0, 2, 3);
    _tile_loadd(5, codes + 512, 64);
    _tile_dpbsud(1, 2, 5);
  }
  _tile_stored(0, sums, kSumPitch);
  _tile_stored(1, sums + 16, kSumPitch);
}

// What one weight group adds to the sums of `rows` rows. totals: of the visits of 32 inputs, [visit][all_rows].
struct GroupOfRows {
  const int32_t* dots;  // [rows][32]
  const int32_t* totals;
  const float* scale;
  const float* other;
  float* sums;
  int32_t rows, all_rows, visits, start;
  bool is_first;
};

template <Minimum MINIMUM>
void add_group(const GroupOfRows& of) {
  for (int32_t r = 0; r < of.rows; ++r) {
    int32_t total = 0;
    for (int32_t i = 0; i < of.visits; ++i) total += of.totals[of.all_rows * i + r];
    const Floats lowered = set1(static_cast<float>(-total));
    for (int t = 0; t < kTile; t += 16) {
      float* sum = of.sums + kTile * r + t;
      Floats d = to_floats(add_ints(load_ints(of.dots + kTile * r + t), of.start * total));
      if (MINIMUM == Minimum::kZeroPoint) d = fma(lowered, load(of.other + t), d);
      Floats value = fma(d, load(of.scale + t), of.is_first ? set1(0.0f) : load(sum));
      if (MINIMUM == Minimum::kNumber) value = fma(lowered, load(of.other + t), value);
      store(sum, value);
    }
  }
}

void add_group_of(Minimum minimum, const GroupOfRows& of) {
  if (minimum == Minimum::kNone) return add_group<Minimum::kNone>(of);
  if (minimum == Minimum::kNumber) return add_group<Minimum::kNumber>(of);
  add_group<Minimum::kZeroPoint>(of);
}

// A panel of weights, laid out, and its scales.
struct LaidOut {
  const uint8_t* weights;
  const float* scale;
  const float* other;
  int32_t first, groups;
};

// One or two tiles of rows times a panel.
void multiply_panel(const MatrixView& w, const RowInputs& in, const LaidOut& panel, int32_t tile, float* sums) {
  const int32_t height = height_of(in.rows), tiles = num_row_tiles(in.rows) - tile > 1 ? 2 : 1, row = height * tile;
  const ptrdiff_t tile_bytes = static_cast<ptrdiff_t>(kStep * height) * num_steps(in.groups);
  const int8_t* inputs = in.codes + tile_bytes * tile + kStep / 2 * height * panel.first;
  const auto multiply = tiles == 2 ? multiply_steps<2> : multiply_steps<1>;
  sums += kTile * row;
  if (w.is_channel)
    return multiply(inputs, tile_bytes, height, panel.weights, num_steps(panel.groups),
                    reinterpret_cast<int32_t*>(sums), panel.first == 0);
  alignas(64) int32_t dots[2 * kTileRows * kTile];
  const int32_t visits = 1 << w.group_shift, steps = visits / 2, start = (w.bits == 8 ? kByteOffset : 0) - w.zero;
  const int32_t rows = in.rows - row < height * tiles ? in.rows - row : height * tiles;
  for (int32_t g = 0; g < panel.groups; g += visits) {
    multiply(inputs + kStep / 2 * height * g, tile_bytes, height, panel.weights + kStepBytes / 2 * g, steps, dots, true);
    const int32_t* totals = in.totals + static_cast<ptrdiff_t>(panel.first + g) * in.rows + row;
    const int32_t scales = kTile * (g >> w.group_shift);
    add_group_of(w.minimum, {dots, totals, panel.scale + scales, panel.other + scales, sums, rows, in.rows, visits,
                             start, panel.first + g == 0});
  }
}

void matmul_tile_rows_by_tiles(const MatrixView& w, int32_t index, const RowInputs& in, float* sums, float* scratch,
                               const uint8_t* next) {
  if (!in.is_for_tiles) return matmul_tile_rows(w, index, in, sums, scratch, next);
  const uint8_t* tile = w.tile(index);
  const uint8_t* codes = tile + w.code_offset;
  const int32_t code_bytes = 4 * kGroup * w.bits;
  Ahead ahead = {tile + kPrefetchDistance, tile + w.tile_bytes, next};
  if (w.is_channel && w.bits == 8 && in.rows <= kTileRows) {
    multiply_groups(in.codes, in.rows, codes, w.groups, ahead, reinterpret_cast<int32_t*>(sums));
    return finish_rows(w, tile, in, sums);
  }
  const int32_t all_lines = w.is_channel ? code_bytes / 64 : ahead_lines(w.bits);
  const int32_t lines = w.is_channel ? all_lines : all_lines - kLinesWhileDecoding;
  alignas(64) uint8_t weights[kStepsAtOnce * kStepBytes];
  LaidOut panel = {weights, scratch, scratch + kPanel * kTile, 0, 0};
  for (; panel.first < w.groups; panel.first += panel.groups) {
    panel.groups = w.groups - panel.first < 2 * kStepsAtOnce ? w.groups - panel.first : 2 * kStepsAtOnce;
    ahead.at = tile + static_cast<size_t>(panel.first) * 64 * all_lines + kPrefetchDistance;
    if (!w.is_channel)
      decode_row_panel(w, tile, panel.first, panel.groups, scratch, scratch + kPanel * kTile, ahead);
    const auto lay_out = w.bits == 4 ? lay_out_steps<4> : lay_out_steps<8>;
    lay_out(codes + static_cast<size_t>(panel.first) * code_bytes, panel.groups, lines, ahead, weights);
    for (int32_t t = 0; t < num_row_tiles(in.rows); t += 2) multiply_panel(w, in, panel, t, sums);
  }
  finish_rows(w, tile, in, sums);
}

void quantize_row_for_tiles(const float* x, const float* weight, float eps, const InputGrid& grid, const RowInputs& out,
                            int32_t row, float* scratch) {
  if (!out.is_for_tiles) return quantize_row(x, weight, eps, grid, out, row, scratch);
  const int32_t height = height_of(out.rows), tile = row / height;
  const ptrdiff_t tile_bytes = static_cast<ptrdiff_t>(kStep * height) * num_steps(out.groups);
  int8_t* codes = out.codes + tile_bytes * tile + kStep * (row - height * tile);
  quantize_row_to({codes, out.totals + row, kGroup, kStep * height, out.rows}, x, weight, eps, grid, out, row, scratch);
}

constexpr Kernels with_tiles() {
  Kernels table = kTable;
  table.wants_tiles = gains_by_tiles;
  table.begin_rows = begin_rows_by_tiles;
  table.matmul_tile_rows = matmul_tile_rows_by_tiles;
  table.quantize_row = quantize_row_for_tiles;
  return table;
}

constexpr Kernels kTilesTable = with_tiles();
